"""Which quantized layers lose nothing when their inputs are rounded to 8 bits and not to 16.

Measured, chosen, recorded.

The CPU kernels of integers round x before they multiply it: to integers of at most `LEVELS`, with a
scale per token and block of columns. Here the inputs of a model's layers are rounded in the same way,
so that the cost can be seen without the kernels. config.json records the chosen layers
(`rac_sparsity.int8_activations`), and the vLLM plugin obeys that record.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rac_modifier.errors import RacError
from rac_modifier.evaluation.dense_reference import DenseReference
from rac_modifier.evaluation.divergence import check_ids
from rac_modifier.evaluation.integer_layers import IntegerLayer
from rac_modifier.evaluation.report import ResultTable
from rac_modifier.evaluation.teacher_forcing import TokenSequence, check_sequences
from rac_modifier.model_tools import evaluating

LEVELS = {8: 127, 16: 127 * 256 + 127}  # the largest integer of x (csrc/gemm/kernel.h)


@dataclass(frozen=True)
class ActivationChoice:
    """The measured layers, of which those get 8 bits whose `share` is at most `limit`.

    divergence: of the model with the chosen layers in 8 bits from the model with none, as
    `DivergenceResult.as_dict` has it.
    """

    limit: float
    layers: tuple[IntegerLayer, ...]
    divergence: Mapping[str, Any]

    @property
    def modules(self) -> list[str]:
        """The names of the chosen layers."""
        return [layer.module for layer in self.layers if layer.share <= self.limit]

    def bits(self, layer: IntegerLayer) -> int:
        """Return the bits of a layer's activations."""
        return 8 if layer.share <= self.limit else 16

    def as_dict(self, source: str) -> dict[str, Any]:
        """Return the entry of the run record; `source`: of the sequences."""
        layers = {
            layer.module: {
                "error": layer.error,
                "own_error": layer.own_error,
                "bits": self.bits(layer),
            }
            for layer in self.layers
        }
        names = ("sequences", "tokens", "kl", "kl_stderr", "agreement")
        divergence = {name: self.divergence[name] for name in names}
        return {"limit": self.limit, "source": source, "layers": layers, **divergence}

    def describe(self) -> str:
        """Return one line."""
        count = f"{len(self.modules)} of {len(self.layers)} layers in 8 bits"
        if not self.modules:
            least = min((layer.share for layer in self.layers), default=float("inf"))
            return (
                f"{count}: 8 bits add at least {least:.3g} of a layer's own error, and the limit is "
                f"{self.limit:g}; a larger --limit takes more layers"
            )
        return (
            f"{count}: KL {self.divergence['kl']:.2e} nats per token from the model with none, and "
            f"the most likely token is the same for {self.divergence['agreement']:.2%} of "
            f"{self.divergence['tokens']:,}"
        )

    def table(self) -> ResultTable:
        """Return a row per layer."""
        rows = tuple(
            (
                layer.module,
                f"{layer.error:.2e}",
                f"{layer.own_error:.2e}",
                str(self.bits(layer)),
            )
            for layer in self.layers
        )
        note = (
            f"8 bits where they add at most {self.limit:g} of the layer's own error; both are "
            "relative squared errors of its output."
        )
        return ResultTable(("layer", "error of 8 bits", "own error", "bits"), rows, note)


def choose_activations(
    model: Any,
    layers: Sequence[IntegerLayer],
    sequences: Sequence[TokenSequence],
    limit: float,
    dense: Any = None,
) -> ActivationChoice:
    """Measure each layer, choose the layers that lose nothing, and measure what these in 8 bits do to predictions.

    `dense`: the model before pruning and rounding (`check_original`), for unknown own errors.

    Raises:
        RacError: what `measure_activations` and `DenseReference` raise.
    """
    measured = measure_activations(model, layers, sequences, dense)
    reference = DenseReference(model, sequences)
    with rounded_inputs(model, [layer for layer in measured if layer.share <= limit]):
        divergence = reference.divergence(model, label="8 bits")
    return ActivationChoice(limit, measured, divergence.as_dict())


@torch.no_grad()
def measure_activations(
    model: Any,
    layers: Sequence[IntegerLayer],
    sequences: Sequence[TokenSequence],
    dense: Any = None,
) -> tuple[IntegerLayer, ...]:
    """Return the layers with their errors on all tokens of `sequences`, in float32.

    One forward pass per sequence.

    Raises:
        RacError: a layer that the model does not have, sequences that `divergence` refuses, or
            activations that are not finite.
    """
    sums = {layer.module: [0.0, 0.0, 0.0, 0.0] for layer in layers}
    originals: Mapping[str, Any] = {} if dense is None else dict(dense.named_modules())

    def add(layer: IntegerLayer, module: Any, x: Tensor) -> None:
        weight = module.weight.float()
        eight, sixteen = rounded(x, layer.block, 8), rounded(x, layer.block, 16)
        outputs = [F.linear(eight - sixteen, weight), F.linear(sixteen, weight)]
        if layer.own_error is None:
            original = originals[layer.module].weight.to(weight)
            outputs += [F.linear(x.float(), original - weight), F.linear(x.float(), original)]
        for i, output in enumerate(outputs):
            sums[layer.module][i] += float(output.square().sum(dtype=torch.float64))

    check_sequences(sequences)
    check_ids("quantized", model, sequences)
    with _hooks(model, layers, add), evaluating(model):
        for ids, _ in sequences:
            model(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False)
    measured = []
    for layer, (change, whole, lost, original) in zip(layers, sums.values(), strict=True):
        error = change / whole if whole else 0.0
        if not 0 <= error < float("inf"):
            raise RacError(
                f"{layer.module}: its activations are not finite; load the model in float32"
            )
        own_error = layer.own_error
        if own_error is None:
            own_error = lost / original if original else 0.0
        measured.append(replace(layer, own_error=own_error, error=error))
    return tuple(measured)


def rounded(x: Tensor, block: int, bits: int) -> Tensor:
    """Round X [..., K] as the kernels do.

    Float32, integers of `bits` times a scale per row and `block` columns.
    """
    columns, levels = x.shape[-1], LEVELS[bits]
    blocks = F.pad(x.float(), (0, -columns % block)).unflatten(-1, (-1, block))
    largest = blocks.abs().amax(-1, keepdim=True)
    numbers = torch.where(largest >= 1e-30, blocks * (levels / largest), 0.0)
    integers = torch.trunc(numbers + torch.where(numbers < 0, -0.5, 0.5))
    return (integers * (largest / levels)).flatten(-2)[..., :columns]


@contextlib.contextmanager
def rounded_inputs(model: Any, layers: Iterable[IntegerLayer]) -> Iterator[None]:
    """Round the inputs of these layers to 8 bits while the context is open."""

    def round_input(layer: IntegerLayer, module: Any, x: Tensor) -> tuple[Tensor]:
        return (rounded(x, layer.block, 8).to(x.dtype),)

    with _hooks(model, layers, round_input):
        yield


@contextlib.contextmanager
def _hooks(
    model: Any, layers: Iterable[IntegerLayer], call: Callable[[IntegerLayer, Any, Tensor], Any]
) -> Iterator[None]:
    modules: Mapping[str, Any] = dict(model.named_modules())
    with contextlib.ExitStack() as stack:
        for layer in layers:
            if layer.module not in modules:
                raise RacError(
                    f"{layer.module}: quantized in the checkpoint, but no layer of the model as "
                    "transformers names them, so it cannot be measured"
                )

            def hook(module: Any, args: tuple[Tensor, ...], layer: IntegerLayer = layer) -> Any:
                return call(layer, module, args[0])

            stack.callback(modules[layer.module].register_forward_pre_hook(hook).remove)
        yield


def check_original(model: Any, dense: Any, layers: Sequence[IntegerLayer]) -> None:
    """Refuse a dense model against which the own errors of these layers cannot be measured.

    Raises:
        RacError: it is quantized itself, it lacks a layer or has another shape of it, or its norms
            differ: then it is another model, or its weights were rescaled before they were rounded,
            as by AWQ, so that the layers have other inputs.
    """
    modules, originals = dict(model.named_modules()), dict(dense.named_modules())
    for name in (layer.module for layer in layers if layer.module in modules):
        if getattr(originals.get(name), "quantization_scheme", None) is not None:
            raise RacError(
                f"{name}: quantized in the dense model too; name the model that was quantized"
            )
        ours, theirs = (_sizes(of.get(name)) for of in (modules, originals))
        if ours != theirs:
            raise RacError(
                f"{name}: {ours} here and {theirs} in the dense model; name the model that was "
                "quantized"
            )
    vectors = {name: p for name, p in dense.named_parameters() if p.dim() == 1}
    for name, vector in model.named_parameters():
        if name not in vectors:
            continue
        other = vectors[name].to(vector.device).float()
        if not torch.allclose(vector.float(), other, rtol=0.02, atol=1e-5):
            raise RacError(
                f"{name}: differs from that of the dense model, so that is another model, or its "
                "weights were rescaled before they were rounded (as by AWQ), and own errors cannot "
                "be measured; name the model that was quantized"
            )


def _sizes(module: Any) -> str:
    linear = isinstance(module, torch.nn.Linear)
    return f"[{module.out_features}, {module.in_features}]" if linear else "no linear layer"
