"""Which layers lose nothing when their inputs are rounded to 8 bits instead of 16.

The CPU kernels round x to integers of at most `LEVELS`, with a scale per token and block of
columns. config.json records the chosen layers (`rac_sparsity.int8_activations`) for the plugin.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rac_modifier.checkpoint.dense_codes import OF_VOCABULARY, why_not_codes
from rac_modifier.checkpoint.quantization_config import (
    CONFIG_FILE,
    QUANTIZATION_KEY,
    packed_format,
    weight_schemes,
)
from rac_modifier.checkpoint.record import RUN_RECORD_NAME
from rac_modifier.errors import RacError
from rac_modifier.evaluation.divergence import DenseReference
from rac_modifier.evaluation.report import ResultTable
from rac_modifier.evaluation.teacher_forcing import TokenSequence, check_sequences
from rac_modifier.files import read_json
from rac_modifier.kernels.cpu import UNIT, encoding_of
from rac_modifier.kernels.cpu.packed import block_of
from rac_modifier.kernels.interface import EXPERT
from rac_modifier.kernels.plan import PlanRow, plan_checkpoint, plan_dense_codes
from rac_modifier.model_tools import evaluating

LEVELS = {8: 127, 16: 127 * 256 + 127}  # the largest integer of x (csrc/gemm/kernel.h)


@dataclass(frozen=True)
class IntegerLayer:
    """A layer that the CPU kernels multiply as integers.

    block: columns of x that share a scale. own_error: ||W x - Q x||^2 / ||W x||^2 for the
    weight W before and Q after pruning and rounding; None until it is measured. error: ||Q
    (x8 - x16)||^2 / ||Q x16||^2, for x rounded to 8 and 16 bits.
    """

    module: str
    block: int
    own_error: float | None = None
    error: float = float("nan")

    @property
    def share(self) -> float:
        """Return the error of 8 bits over the layer's own error; infinite if that is zero."""
        return self.error / self.own_error if self.own_error else float("inf")


def layers_of(folder: Path, *, recorded: bool = True) -> tuple[list[IntegerLayer], dict[str, int]]:
    """Return the linear layers of a checkpoint that the CPU kernels multiply as integers.

    Also count the other compressed modules by the reason why they keep 16 bits. `recorded`: with
    the own errors of the run record (RacError: it lacks one; there are no such layers).
    """
    if not (folder / CONFIG_FILE).is_file():
        raise RacError(
            f"{folder}: no folder of a checkpoint; hf download ID --local-dir FOLDER makes one"
        )
    config = read_json(folder / CONFIG_FILE)
    if packed_format(config) is not None:
        rows = [row for row in plan_checkpoint(folder) if row.layer is not None]
    else:
        _check_dense(folder, config)
        rows = plan_dense_codes(folder)
    planned = {row.module: _layer(row) for row in rows}
    layers = [layer for layer in planned.values() if isinstance(layer, IntegerLayer)]
    left_out = {module: why for module, why in planned.items() if isinstance(why, str)}
    if not layers:
        module, why = next(iter(left_out.items()), ("it", "has no quantized linear layer"))
        raise RacError(
            f"{folder}: none of its layers may have activations of 8 bits ({module}: {why}); "
            "quantize linear layers to int8 or int4"
        )
    errors = _recorded_errors(folder, layers) if recorded else {}
    layers = [replace(layer, own_error=errors.get(layer.module)) for layer in layers]
    return layers, dict(Counter(left_out.values()))


def _layer(row: PlanRow) -> IntegerLayer | str:
    """Return the layer of a row, or why its activations keep 16 bits."""
    if EXPERT.search(row.module):
        return "routed experts take 16 bits"
    if OF_VOCABULARY.search(row.module):
        return "heads and embeddings take 16 bits"
    if row.layer is None:
        return row.decision.reason
    columns, group = row.layer.columns, row.layer.group
    if columns % group:
        return f"its {columns} columns are no multiple of its groups of {group}"
    block = activation_block(row.layer.stored, group, columns, row.layer.word_bits)
    return IntegerLayer(row.module, block) if block else "the kernels multiply its values as floats"


def activation_block(
    stored: torch.dtype, group: int, columns: int, word_bits: int = 4
) -> int | None:
    """Return the columns of x that share a scale; None where the kernels multiply floats.

    `word_bits`: of a value in weights `stored` as int32 words.
    """
    encoding = encoding_of(stored, group, columns, torch.bfloat16, word_bits)
    if encoding.dtype != torch.int8:
        return None
    return block_of(columns, group, UNIT[encoding.bits])


def _check_dense(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse a checkpoint without dense weights of 2 to 4 bits, or with quantized activations."""
    schemes = weight_schemes(config.get(QUANTIZATION_KEY))
    refused = []
    for s in schemes:
        rounds = s.activations is not None
        if why := why_not_codes(s.kind, s.bits, s.strategy, s.format, activations=rounds):
            refused.append(f"{why}: {s.describe()}")
    # which modules a scheme quantizes is not known from the tensors
    rounds = any(scheme.activations is not None for scheme in schemes)
    if rounds or len(refused) == len(schemes):
        reason = refused[0] if refused else "config.json has no config_groups with weights"
        raise RacError(
            f"{folder}: no kernel multiplies its dense weights with rounded activations "
            f"({reason}); give the folder of a packed int8 or int4 checkpoint, or of a dense W4A16 "
            "one of compressed-tensors"
        )


def _recorded_errors(folder: Path, layers: list[IntegerLayer]) -> dict[str, float]:
    path = folder / RUN_RECORD_NAME
    modules = (read_json(path) if path.is_file() else {}).get("modules") or []
    errors = {m["name"]: float(m["relative_error"]) for m in modules if "relative_error" in m}
    if missing := [layer.module for layer in layers if layer.module not in errors]:
        raise RacError(
            f"{folder}: {RUN_RECORD_NAME} has no error of {missing[0]} ({len(missing)} layers in "
            "all), and 8 bits are compared with it; name the model that was quantized "
            "(--dense MODEL)"
        )
    return errors


@dataclass(frozen=True)
class ActivationChoice:
    """The measured layers; a layer gets 8 bits if its `share` is at most `limit`.

    `divergence`: of the model with these in 8 bits from the model with none, as a dict.
    """

    limit: float
    layers: tuple[IntegerLayer, ...]
    divergence: Mapping[str, Any]

    @property
    def modules(self) -> list[str]:
        """Return the names of the chosen layers."""
        return [layer.module for layer in self.layers if self._bits(layer) == 8]

    def _bits(self, layer: IntegerLayer) -> int:
        return 8 if layer.share <= self.limit else 16

    def as_dict(self, source: str) -> dict[str, Any]:
        """Return the entry of the run record; `source`: of the sequences."""
        layers = {
            x.module: {"error": x.error, "own_error": x.own_error, "bits": self._bits(x)}
            for x in self.layers
        }
        names = ("sequences", "tokens", "kl", "kl_stderr", "agreement")
        divergence = {name: self.divergence[name] for name in names}
        return {"limit": self.limit, "source": source, "layers": layers, **divergence}

    def table(self) -> ResultTable:
        """Return a row per layer, and a note on the choice."""
        rows = tuple(
            (x.module, f"{x.error:.2e}", f"{x.own_error:.2e}", str(self._bits(x)))
            for x in self.layers
        )
        kl, agreement, tokens = (self.divergence[name] for name in ("kl", "agreement", "tokens"))
        note = (
            f"{len(self.modules)} of {len(self.layers)} layers in 8 bits, where these add at most "
            f"{self.limit:g} of the layer's own error (both relative squared errors of its "
            f"output): KL {kl:.2e} nats per token from the model with none, and the most likely "
            f"token is the same for {agreement:.2%} of {tokens:,}."
        )
        return ResultTable(("layer", "error of 8 bits", "own error", "bits"), rows, note)


def choose_activations(
    model: Any,
    layers: Sequence[IntegerLayer],
    sequences: Sequence[TokenSequence],
    limit: float,
    dense: Any = None,
) -> ActivationChoice:
    """Measure each layer, choose layers that lose nothing, and measure their divergence.

    `dense`: the model before pruning and rounding (`check_original`), for unknown own errors.
    """
    measured = measure_activations(model, layers, sequences, dense)
    reference = DenseReference(model, sequences)
    chosen = [layer for layer in measured if layer.share <= limit]
    with _hooks(model, chosen, lambda layer, _, x: (rounded(x, layer.block, 8).to(x.dtype),)):
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

    Raises:
        RacError: a layer that the model does not have, or activations that are not finite.
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

    check_sequences(sequences, model)
    with _hooks(model, layers, add), evaluating(model):
        for ids, _ in sequences:
            model(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False)
    measured = []
    for layer, (change, output, lost, original) in zip(layers, sums.values(), strict=True):
        error = change / output if output else 0.0
        if not 0 <= error < float("inf"):
            raise RacError(
                f"{layer.module}: its activations are not finite; load the model in float32"
            )
        if layer.own_error is None:
            layer = replace(layer, own_error=lost / original if original else 0.0)
        measured.append(replace(layer, error=error))
    return tuple(measured)


def rounded(x: Tensor, block: int, bits: int) -> Tensor:
    """Round X [..., K] as the kernels do, to integers of `bits` times a scale per row and block."""
    columns, levels = x.shape[-1], LEVELS[bits]
    blocks = F.pad(x.float(), (0, -columns % block)).unflatten(-1, (-1, block))
    largest = blocks.abs().amax(-1, keepdim=True)
    numbers = torch.where(largest >= 1e-30, blocks * (levels / largest), 0.0)
    integers = torch.trunc(numbers + torch.where(numbers < 0, -0.5, 0.5))
    return (integers * (largest / levels)).flatten(-2)[..., :columns]


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
    """Refuse a dense model against which the own errors of these layers cannot be measured."""
    modules, originals = dict(model.named_modules()), dict(dense.named_modules())
    for name in (layer.module for layer in layers if layer.module in modules):
        original, shape = originals.get(name), _shape(modules[name])
        quantized = getattr(original, "quantization_scheme", None) is not None
        if quantized or not isinstance(original, torch.nn.Linear) or _shape(original) != shape:
            raise RacError(
                f"{name}: no dense layer of shape {shape} in the dense model; name the model that "
                "was quantized"
            )
    vectors = {name: p for name, p in dense.named_parameters() if p.dim() == 1}
    for name, vector in model.named_parameters():
        original = vectors.get(name, vector).to(vector.device).float()
        if not torch.allclose(vector.float(), original, rtol=0.02, atol=1e-5):
            raise RacError(
                f"{name}: differs from the dense model's, so that is another model, or its weights "
                "were rescaled before they were rounded (as by AWQ), and own errors cannot be "
                "measured; name the model that was quantized"
            )


def _shape(linear: Any) -> list[int]:
    return [linear.out_features, linear.in_features]  # a compressed layer has no weight yet
