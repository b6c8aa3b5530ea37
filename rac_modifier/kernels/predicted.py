"""How long the linear layers of a checkpoint would take on a GPU, per decode step. Predicted; nothing was measured on a GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from rac_modifier.checkpoint.inspect import CheckpointReport, ModuleRow, is_embedding
from rac_modifier.errors import RacError
from rac_modifier.kernels.cuda.backend import fit, slower
from rac_modifier.kernels.cuda.cards import Card, card_of
from rac_modifier.kernels.cuda.measured import Measured, contender_of, read_measured
from rac_modifier.kernels.cuda.predict import DENSE, Time, check_tokens, dense_time, sparse_time
from rac_modifier.kernels.interface import EXPERT, Layer
from rac_modifier.kernels.plan import PlanRow

__all__ = [
    "Measured",
    "PredictedLayer",
    "Prediction",
    "card_of",
    "check_tokens",
    "measured_times",
    "predict_checkpoint",
    "read_measured",
]

_FUSED = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    **dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj"),
}
_KEPT_IN_16_BITS = (
    "lm_head",
    "gate",
    "shared_expert_gate",
    "router",
)  # by every contender; last part of a name
_QUANTIZED = ("I8", "I4", "F8_E4M3", "F8_E5M2")
_BF16 = 2.0  # bytes


@dataclass(frozen=True)
class PredictedLayer:
    """Layers [rows, columns] of one kind that run alike, `count` of them. Times are microseconds of one.

    kernel: the title of a layout, such as "2:4 int4" or "unstructured", or "dense". reason: why it is dense, None for a kernel.
    nbytes: what a step reads of the weight; of an unstructured one, what is expected of its density.
    time: here. dense: what vLLM takes without our kernels, by the names of `DENSE`. contender: what `make gpu-check` calls it,
    None where it does not time that.
    """

    kind: str
    rows: int
    columns: int
    count: int
    kernel: str
    reason: str | None
    nbytes: float
    time: Time
    dense: Mapping[str, float]
    contender: str | None


@dataclass(frozen=True)
class Prediction:
    """The layers that a step of `tokens` tokens multiplies. left_out: why modules are not in it, and how many."""

    card: Card
    tokens: int
    layers: tuple[PredictedLayer, ...]
    left_out: Mapping[str, int]

    @property
    def here(self) -> float:
        """Microseconds of all layers, on our kernels where they have one."""
        return sum(layer.count * layer.time.total for layer in self.layers)

    def dense(self, contender: str) -> float:
        """Microseconds of all layers as vLLM runs them dense, in a format of `DENSE`."""
        return sum(layer.count * layer.dense[contender] for layer in self.layers)

    @property
    def in_cache(self) -> bool:
        """Whether L2 holds all weights. They are then not read from memory at each step, and the times are too long."""
        return sum(layer.count * layer.nbytes for layer in self.layers) < self.card.cache


@dataclass(frozen=True)
class _Module:
    """A linear layer. layer: what the kernels decide on; None where it is dense for `reason`, with `own` bytes per weight."""

    kind: str
    rows: int
    columns: int
    layer: Layer | None
    reason: str
    own: float
    quantizable: bool


def predict_checkpoint(
    report: CheckpointReport, plan: Sequence[PlanRow], card: Card, tokens: int
) -> Prediction:
    """Predict a step of `tokens` tokens on one GPU, with RAC_GPU_KERNELS=on and in bfloat16.

    q, k, v and gate, up are fused as vLLM fuses them. Experts are left out: which of them a token reads is not known here.

    Raises:
        RacError: a number of tokens that times are not predicted for.
    """
    check_tokens(tokens)
    planned = {row.module: row for row in plan}
    left_out: Counter[str] = Counter()
    parts: dict[tuple[str, int], list[_Module]] = {}
    for row in report.modules:
        parent, _, last = row.name.rpartition(".")
        if not row.read_per_token:
            left_out["an embedding, of which a token reads one row"] += 1
        elif EXPERT.search(row.name):
            left_out["experts: which of them a token reads is not known here"] += 1
        else:
            parts.setdefault((f"{parent}.{_FUSED.get(last, last)}", row.columns), []).append(
                _module(row, planned)
            )
    layers = [
        _predict(module, card, tokens)
        for name, found in parts.items()
        for module in _fuse(name[0], found)
    ]
    counts = Counter(_alike(layer) for layer in layers)
    kinds = {_alike(layer): layer for layer in layers}
    return Prediction(
        card,
        tokens,
        tuple(replace(layer, count=counts[key]) for key, layer in kinds.items()),
        left_out,
    )


def measured_times(prediction: Prediction, measured: Measured) -> list[float | None]:
    """Microseconds that a product of each predicted layer took; None where its shape, kernel or number of tokens was not timed.

    Raises:
        RacError: times of another card, or none of any of these layers.
    """
    if measured.card != prediction.card:
        raise RacError(
            f"{measured.source} was measured on {measured.card.title}, and times are predicted for {prediction.card.title}; give "
            f"--device {measured.card.name}, or the file of that card"
        )
    tokens = prediction.tokens
    found = [
        measured.us(each.rows, each.columns, tokens, each.contender) for each in prediction.layers
    ]
    if not any(found):
        there = ", ".join(dict.fromkeys(f"{each.rows}x{each.columns}" for each in measured.times))
        numbers = ", ".join(
            str(number) for number in sorted({each.tokens for each in measured.times})
        )
        raise RacError(
            f"{measured.source} has no time of any of these layers with {tokens} tokens per step; it has layers of {there} with "
            f"{numbers} tokens"
        )
    return found


def _module(row: ModuleRow, planned: Mapping[str, PlanRow]) -> _Module:
    kind, plan = row.name.rpartition(".")[2], planned.get(row.name)
    quantizable = kind not in _KEPT_IN_16_BITS and not is_embedding(row.name)
    layer = (
        None if plan is None or plan.layer is None else replace(plan.layer, served=torch.bfloat16)
    )
    reason = f"dense because {row.reason}" if plan is None else plan.decision.reason
    # a quantized weight that is not packed runs on vLLM's own method for it
    quantized = plan is None and (row.dtype in _QUANTIZED or row.stored == "quantized")
    own = row.bytes_per_weight if quantized else _BF16
    return _Module(kind, row.rows, row.columns, layer, reason, own, quantizable)


def _fuse(name: str, parts: Sequence[_Module]) -> Iterator[_Module]:
    """One module, as vLLM makes it of these parts."""
    if len(parts) == 1:
        yield parts[0]
        return
    first, rows = parts[0], sum(part.rows for part in parts)
    own = sum(part.rows * part.own for part in parts) / rows
    layers = [part.layer for part in parts if part.layer is not None]
    whole, reason = None, first.reason
    if layers and len(layers) < len(parts):
        reason = "dense because one part of the fused layer is stored dense"
    elif (
        len({(each.two_of_four, each.stored, each.group, each.zero_points) for each in layers}) > 1
    ):
        reason = "dense because the parts of the fused layer are stored differently"
    elif layers:
        stored = sum(each.rows * each.density for each in layers)
        scales = max(each.group_bytes for each in layers)  # those of all parts are packed alike
        whole = replace(layers[0], rows=rows, density=stored / rows, group_bytes=scales)
    yield _Module(
        name.rpartition(".")[2],
        rows,
        first.columns,
        whole,
        reason,
        own,
        all(p.quantizable for p in parts),
    )


def _predict(module: _Module, card: Card, tokens: int) -> PredictedLayer:
    shape = module.rows, module.columns
    layout, reason, own = None, module.reason, module.own
    if module.layer is not None:
        layout, problem = fit(module.layer)
        if layout is not None and problem is None:
            problem = slower(module.layer, layout, card)
        if problem is not None:
            layout, reason = None, f"dense because {problem}"
    contenders = {name: size if module.quantizable else _BF16 for name, size in DENSE.items()}
    dense = {
        name: dense_time(card, *shape, tokens, size).total for name, size in contenders.items()
    }
    if layout is None:
        time, size = dense_time(card, *shape, tokens, own), own * module.rows * module.columns
        return PredictedLayer(
            module.kind, *shape, 1, "dense", reason, size, time, dense, contender_of(None, 1.0, own)
        )
    assert module.layer is not None
    density = module.layer.density
    time = sparse_time(card, layout, *shape, tokens, density)
    size, contender = layout.nbytes(*shape, density), contender_of(layout, density, own)
    return PredictedLayer(module.kind, *shape, 1, layout.title, None, size, time, dense, contender)


def _alike(layer: PredictedLayer) -> tuple[object, ...]:
    return layer.kind, layer.rows, layer.columns, layer.kernel, layer.reason, layer.nbytes
