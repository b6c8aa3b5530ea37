"""Which quantized layers lose nothing when their inputs are rounded to 8 bits and not to 16, measured on given sequences.

The CPU kernels of integers round x before they multiply it: to integers of at most `levels`, with a scale per token and block of
columns. Here the same rounding is applied to the inputs of a model's layers, so that its cost can be seen without the kernels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from rac_modifier.checkpoint.record import RUN_RECORD_NAME
from rac_modifier.checkpoint.sparsity_config import CONFIG_FILE, packed_format
from rac_modifier.errors import RacError
from rac_modifier.evaluation.dense_reference import DenseReference
from rac_modifier.evaluation.divergence import check_ids
from rac_modifier.evaluation.report import ResultTable
from rac_modifier.evaluation.teacher_forcing import TokenSequence, check_sequences
from rac_modifier.files import read_json
from rac_modifier.kernels.cpu.encoding import encoding_of
from rac_modifier.kernels.cpu.packed import block_of
from rac_modifier.kernels.interface import EXPERT
from rac_modifier.kernels.plan import plan_checkpoint
from rac_modifier.model_tools import evaluating

LEVELS = {8: 127, 16: 127 * 256 + 127}  # the largest integer of x (csrc/int8.h)
LIMIT = 0.01  # of the layer's own error


@dataclass(frozen=True)
class QuantizedLayer:
    """A layer whose weight is kept as integers. `block`: columns of x that share a scale.

    own_error: ||W x - Q x||^2 / ||W x||^2 for the weight W before and Q after pruning and rounding, from the run record.
    """

    module: str
    block: int
    own_error: float

    @classmethod
    def of(cls, module: str, stored: torch.dtype, group: int, columns: int, own_error: float) -> Self | None:
        """The layer of values of dtype `stored` (int32: 4-bit values) of which `group` of `columns` columns share a scale.

        None where the CPU kernels multiply it as floats, and for a routed expert, whose inputs keep 16 bits.
        """
        if EXPERT.search(module) or encoding_of(stored, group, columns, torch.bfloat16).dtype != torch.int8:
            return None
        return cls(module, block_of(columns, group, 8 if stored == torch.int32 else 4), own_error)


@dataclass(frozen=True)
class ActivationError:
    """What 8 bits cost a layer: `error` is ||Q (x8 - x16)||^2 / ||Q x16||^2, for x rounded to 8 and to 16 bits."""

    layer: QuantizedLayer
    error: float

    def loses_nothing(self, limit: float) -> bool:
        """Whether the error is at most `limit` times the layer's own."""
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

    def as_dict(self, source: str) -> dict[str, Any]:
        """The entry of the run record; `source`: of the sequences."""
        chosen = set(self.modules)
        return {
            "limit": self.limit,
            "source": source,
            "layers": {
                each.layer.module: {"error": each.error, "bits": 8 if each.layer.module in chosen else 16}
                for each in self.errors
            },
            **{key: self.divergence[key] for key in ("sequences", "tokens", "kl", "kl_stderr", "agreement")},
        }

    def describe(self) -> str:
        """One line."""
        return (
            f"{len(self.modules)} of {len(self.errors)} layers in 8 bits: KL {self.divergence['kl']:.2e} nats per token from the "
            f"model with none, and the most likely token is the same for {self.divergence['agreement']:.2%} of "
            f"{self.divergence['tokens']:,}"
        )


def quantized_layers(folder: Path) -> list[QuantizedLayer]:
    """The packed linear layers of a checkpoint that the CPU kernels multiply as integers, with what their run records of each.

    Raises:
        RacError: no packed checkpoint, none with such layers, or one without a run record that has the errors.
    """
    if not (folder / CONFIG_FILE).is_file() or packed_format(read_json(folder / CONFIG_FILE)) is None:
        raise RacError(f"{folder}: no folder of a packed checkpoint; pack the model first (rac pack)")
    rows = {
        row.module: (row.layer.stored, row.layer.group, row.layer.columns)
        for row in plan_checkpoint(folder)
        if row.layer
    }
    rows = {module: row for module, row in rows.items() if QuantizedLayer.of(module, *row, own_error=0.0)}
    if not rows:
        raise RacError(
            f"{folder}: none of its packed weights is int8 or int4 (routed experts aside), and activations are rounded for "
            "these only; quantize it too"
        )
    record = read_json(folder / RUN_RECORD_NAME) if (folder / RUN_RECORD_NAME).is_file() else {}
    own = {m["name"]: m["relative_error"] for m in record.get("modules") or [] if "relative_error" in m}
    if missing := [module for module in rows if module not in own]:
        raise RacError(
            f"{folder}: {RUN_RECORD_NAME} has no error of {missing[0]} ({len(missing)} layers in all), and 8 bits are compared "
            "with it; prune and quantize the model in one run of rac, or set RAC_ACTIVATIONS=int8 for all layers unmeasured"
        )
    layers = [QuantizedLayer.of(module, *row, own_error=float(own[module])) for module, row in rows.items()]
    return [layer for layer in layers if layer is not None]


def rounded(x: Tensor, block: int, bits: int) -> Tensor:
    """X [..., K] as the kernels round it: float32, integers of `bits` times a scale per row and `block` columns."""
    columns, levels = x.shape[-1], LEVELS[bits]
    blocks = F.pad(x.float(), (0, -columns % block)).unflatten(-1, (-1, block))
    largest = blocks.abs().amax(-1, keepdim=True)
    some = largest >= 1e-30
    numbers = torch.where(some, blocks * (levels / largest), 0.0)
    integers = torch.trunc(numbers + torch.where(numbers < 0, -0.5, 0.5))
    return (integers * (largest / levels)).flatten(-2)[..., :columns]


@torch.no_grad()
def measure_activations(
    model: Any, layers: Sequence[QuantizedLayer], sequences: Sequence[TokenSequence]
) -> list[ActivationError]:
    """The error of each layer's output on all tokens of `sequences`, in float32: one forward pass per sequence.

    Raises:
        RacError: a layer that the model does not have, sequences that `divergence` refuses, or activations that are not finite.
    """
    sums = {layer.module: [0.0, 0.0] for layer in layers}

    def add(layer: QuantizedLayer, module: Any, x: Tensor) -> None:
        weight, eight, sixteen = module.weight.float(), rounded(x, layer.block, 8), rounded(x, layer.block, 16)
        for i, of in enumerate((eight - sixteen, sixteen)):
            sums[layer.module][i] += float(F.linear(of, weight).square().sum(dtype=torch.float64))

    check_sequences(sequences)
    check_ids("packed", model, sequences)
    with _hooks(model, layers, add), evaluating(model):
        for ids, _ in sequences:
            model(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False)
    found = [
        ActivationError(layer, change / whole if whole else 0.0)
        for layer, (change, whole) in zip(layers, sums.values(), strict=True)
    ]
    if damaged := [each for each in found if not 0 <= each.error < float("inf")]:
        raise RacError(f"{damaged[0].layer.module}: its activations are not finite; load the model in float32")
    return found


def choose_activations(
    model: Any, layers: Sequence[QuantizedLayer], sequences: Sequence[TokenSequence], limit: float
) -> ActivationChoice:
    """Measure each layer, choose those that lose nothing, and measure what all of these in 8 bits do to predictions.

    Raises:
        RacError: what `measure_activations` and `DenseReference` raise.
    """
    errors = tuple(measure_activations(model, layers, sequences))
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
                    f"{layer.module}: packed in the checkpoint, but no layer of this model; save the model again"
                )

            def hook(module: Any, args: tuple[Tensor, ...], layer: QuantizedLayer = layer) -> Any:
                return call(layer, module, args[0])

            stack.callback(modules[layer.module].register_forward_pre_hook(hook).remove)
        yield
