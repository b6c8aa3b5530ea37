"""Which quantized layers lose nothing when their inputs are rounded to 8 bits and not to 16, measured on given sequences.

The CPU kernels of integers round x before they multiply it: to integers of at most `levels`, with a scale per token and block of
columns. Here the same rounding is applied to the inputs of a model's layers, so that its cost can be seen without the kernels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from rac_modifier.errors import RacError
from rac_modifier.evaluation.dense_reference import DenseReference
from rac_modifier.evaluation.divergence import check_ids
from rac_modifier.evaluation.report import ResultTable
from rac_modifier.evaluation.teacher_forcing import TokenSequence, check_sequences
from rac_modifier.kernels.cpu.encoding import UNIT, encoding_of
from rac_modifier.kernels.cpu.packed import block_of
from rac_modifier.kernels.interface import EXPERT
from rac_modifier.model_tools import evaluating

LEVELS = {8: 127, 16: 127 * 256 + 127}  # the largest integer of x (csrc/gemm/kernel.h)
LIMIT = 0.01  # of the layer's own error


@dataclass(frozen=True)
class QuantizedLayer:
    """A layer whose weight is kept as integers. `block`: columns of x that share a scale.

    own_error: ||W x - Q x||^2 / ||W x||^2 for the weight W before and Q after pruning and rounding; None until it is measured.
    """

    module: str
    block: int
    own_error: float | None

    @classmethod
    def of(
        cls,
        module: str,
        stored: torch.dtype,
        group: int,
        columns: int,
        own_error: float | None,
        word_bits: int = 4,
    ) -> Self | None:
        """The layer of values of dtype `stored` (int32: of `word_bits` bits) of which `group` of `columns` columns share a scale.

        None where the CPU kernels multiply it as floats, and for a routed expert, whose inputs keep 16 bits.
        """
        encoding = encoding_of(stored, group, columns, torch.bfloat16, word_bits)
        if EXPERT.search(module) or encoding.dtype != torch.int8:
            return None
        return cls(module, block_of(columns, group, UNIT[encoding.bits]), own_error)


@dataclass(frozen=True)
class ActivationError:
    """What 8 bits cost a layer: `error` is ||Q (x8 - x16)||^2 / ||Q x16||^2, for x rounded to 8 and to 16 bits.

    The layer's own error is known.
    """

    layer: QuantizedLayer
    error: float

    def loses_nothing(self, limit: float) -> bool:
        """Whether the error is at most `limit` times the layer's own."""
        assert self.layer.own_error is not None
        return self.error <= limit * self.layer.own_error


@dataclass(frozen=True)
class ActivationChoice:
    """The layers that get 8 bits, since these add at most `limit` of the layer's own error.

    errors: of all layers that were measured. divergence: of the model with the chosen layers in 8 bits from the one with none,
    as `DivergenceResult.as_dict` has it.
    """

    limit: float
    errors: tuple[ActivationError, ...]
    divergence: Mapping[str, Any]

    @property
    def modules(self) -> list[str]:
        """The names of the chosen layers."""
        return [each.layer.module for each in self.errors if each.loses_nothing(self.limit)]

    @property
    def least_share(self) -> float:
        """The least that 8 bits add to a layer, as a share of its own error; infinite where no layer has one."""
        shares = [each.error / each.layer.own_error for each in self.errors if each.layer.own_error]
        return min(shares, default=float("inf"))

    def as_dict(self, source: str) -> dict[str, Any]:
        """The entry of the run record; `source`: of the sequences."""
        chosen = set(self.modules)
        return {
            "limit": self.limit,
            "source": source,
            "layers": {
                each.layer.module: {
                    "error": each.error,
                    "own_error": each.layer.own_error,
                    "bits": 8 if each.layer.module in chosen else 16,
                }
                for each in self.errors
            },
            **{
                key: self.divergence[key]
                for key in ("sequences", "tokens", "kl", "kl_stderr", "agreement")
            },
        }

    def describe(self) -> str:
        """One line."""
        if not self.modules:
            return (
                f"0 of {len(self.errors)} layers in 8 bits: 8 bits add at least {self.least_share:.3g} of a layer's own error, "
                f"and the limit is {self.limit:g}; a larger --limit takes more layers"
            )
        return (
            f"{len(self.modules)} of {len(self.errors)} layers in 8 bits: KL {self.divergence['kl']:.2e} nats per token from the "
            f"model with none, and the most likely token is the same for {self.divergence['agreement']:.2%} of "
            f"{self.divergence['tokens']:,}"
        )


def rounded(x: Tensor, block: int, bits: int) -> Tensor:
    """X [..., K] as the kernels round it: float32, integers of `bits` times a scale per row and `block` columns."""
    columns, levels = x.shape[-1], LEVELS[bits]
    blocks = F.pad(x.float(), (0, -columns % block)).unflatten(-1, (-1, block))
    largest = blocks.abs().amax(-1, keepdim=True)
    some = largest >= 1e-30
    numbers = torch.where(some, blocks * (levels / largest), 0.0)
    integers = torch.trunc(numbers + torch.where(numbers < 0, -0.5, 0.5))
    return (integers * (largest / levels)).flatten(-2)[..., :columns]


def check_original(model: Any, dense: Any, layers: Sequence[QuantizedLayer]) -> None:
    """Refuse a dense model against which the own errors of these layers cannot be measured.

    Raises:
        RacError: it is quantized itself, it lacks a layer or has another shape of it, or its norms differ: then it is another
            model, or its weights were rescaled before they were rounded, as by AWQ, so that the layers have other inputs.
    """
    modules, originals = dict(model.named_modules()), dict(dense.named_modules())
    for name in (layer.module for layer in layers if layer.module in modules):
        if getattr(originals.get(name), "quantization_scheme", None) is not None:
            raise RacError(
                f"{name}: quantized in the dense model too; name the model that was quantized"
            )
        ours, theirs = (_sizes(found.get(name)) for found in (modules, originals))
        if ours != theirs:
            raise RacError(
                f"{name}: {ours} here and {theirs} in the dense model; name the model that was quantized"
            )
    vectors = {name: p for name, p in dense.named_parameters() if p.dim() == 1}
    for name, own in model.named_parameters():
        other = vectors.get(name)
        if other is None or torch.allclose(
            own.float(), other.to(own.device).float(), rtol=0.02, atol=1e-5
        ):
            continue
        raise RacError(
            f"{name}: differs from that of the dense model, so that is another model, or its weights were rescaled before they "
            "were rounded (as by AWQ), and own errors cannot be measured; name the model that was quantized, or set "
            "RAC_ACTIVATIONS=int8 for all layers unmeasured"
        )


@torch.no_grad()
def measure_activations(
    model: Any,
    layers: Sequence[QuantizedLayer],
    sequences: Sequence[TokenSequence],
    dense: Any = None,
) -> list[ActivationError]:
    """The error of each layer's output on all tokens of `sequences`, in float32: one forward pass per sequence.

    `dense`: the model before pruning and rounding (`check_original`), for layers whose own error is not known.

    Raises:
        RacError: a layer that the model does not have, sequences that `divergence` refuses, or activations that are not finite.
    """
    sums = {layer.module: [0.0, 0.0, 0.0, 0.0] for layer in layers}
    originals: Mapping[str, Any] = {} if dense is None else dict(dense.named_modules())

    def add(layer: QuantizedLayer, module: Any, x: Tensor) -> None:
        weight, eight, sixteen = (
            module.weight.float(),
            rounded(x, layer.block, 8),
            rounded(x, layer.block, 16),
        )
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
    found = []
    for layer, (change, whole, own, original) in zip(layers, sums.values(), strict=True):
        if layer.own_error is None:
            layer = replace(layer, own_error=own / original if original else 0.0)
        found.append(ActivationError(layer, change / whole if whole else 0.0))
    if damaged := [each for each in found if not 0 <= each.error < float("inf")]:
        raise RacError(
            f"{damaged[0].layer.module}: its activations are not finite; load the model in float32"
        )
    return found


def choose_activations(
    model: Any,
    layers: Sequence[QuantizedLayer],
    sequences: Sequence[TokenSequence],
    limit: float,
    dense: Any = None,
) -> ActivationChoice:
    """Measure each layer, choose those that lose nothing, and measure what all of these in 8 bits do to predictions.

    `dense` as for `measure_activations`.

    Raises:
        RacError: what `measure_activations` and `DenseReference` raise.
    """
    errors = tuple(measure_activations(model, layers, sequences, dense))
    reference = DenseReference(model, sequences)
    with rounded_inputs(model, [each.layer for each in errors if each.loses_nothing(limit)]):
        divergence = reference.divergence(model, label="8 bits")
    return ActivationChoice(limit, errors, divergence.as_dict())


@contextlib.contextmanager
def rounded_inputs(model: Any, layers: Iterable[QuantizedLayer]) -> Iterator[None]:
    """The model with the inputs of these layers rounded to 8 bits."""

    def replace(layer: QuantizedLayer, module: Any, x: Tensor) -> tuple[Tensor]:
        return (rounded(x, layer.block, 8).to(x.dtype),)

    with _hooks(model, layers, replace):
        yield


def activation_table(found: Sequence[ActivationError], limit: float) -> ResultTable:
    """A row per layer."""
    rows = tuple(
        (
            each.layer.module,
            f"{each.error:.2e}",
            f"{each.layer.own_error:.2e}",
            "8" if each.loses_nothing(limit) else "16",
        )
        for each in found
    )
    note = f"8 bits where they add at most {limit:g} of the layer's own error; both are relative squared errors of its output."
    return ResultTable(("layer", "error of 8 bits", "own error", "bits"), rows, note)


@contextlib.contextmanager
def _hooks(
    model: Any, layers: Iterable[QuantizedLayer], call: Callable[[QuantizedLayer, Any, Tensor], Any]
) -> Iterator[None]:
    modules: Mapping[str, Any] = dict(model.named_modules())
    with contextlib.ExitStack() as stack:
        for layer in layers:
            if layer.module not in modules:
                raise RacError(
                    f"{layer.module}: quantized in the checkpoint, but no layer of the model as transformers names them; set "
                    "RAC_ACTIVATIONS=int8 for all layers unmeasured"
                )

            def hook(module: Any, args: tuple[Tensor, ...], layer: QuantizedLayer = layer) -> Any:
                return call(layer, module, args[0])

            stack.callback(modules[layer.module].register_forward_pre_hook(hook).remove)
        yield


def _sizes(module: Any) -> str:
    return (
        f"[{module.out_features}, {module.in_features}]"
        if isinstance(module, torch.nn.Linear)
        else "no linear layer"
    )
