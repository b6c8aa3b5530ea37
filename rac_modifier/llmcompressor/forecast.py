"""Forecast the memory that pruning takes, and refuse a run that does not fit.

Activations are counted: tokens (d + hidden) numbers for a group that reads d columns, layer by
layer tokens hidden. Statistics, solver and a forward pass are rehearsed (runtime/models.py).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from llmcompressor.utils.helpers import calibration_forward_context
from loguru import logger
from torch import Tensor
from transformers import PreTrainedModel

from rac_modifier.calibration.loader import CalibrationLoader
from rac_modifier.errors import RacError
from rac_modifier.formats.encoding import Encoding
from rac_modifier.llmcompressor.run import Run
from rac_modifier.llmcompressor.solving import solver_options
from rac_modifier.measure.teacher_forcing import input_of_head
from rac_modifier.pruning.hessian import ROWS, Hessian, Statistics
from rac_modifier.pruning.problem import Problem
from rac_modifier.pruning.solve import solve_many
from rac_modifier.quantization.solve import quantize_many
from rac_modifier.runtime.cpu_tuning import HEAP_GAPS, expect_growth
from rac_modifier.runtime.models import LiveBytes, free_bytes, widened_peak, without_data
from rac_modifier.runtime.progress import Phase
from rac_modifier.settings.entries import PruningEntry
from rac_modifier.settings.pattern import Pattern

_FLOAT32 = 4
_SOLVER_PEAKS: dict[Any, int] = {}  # a run asks twice, and later runs of the process ask again


@dataclass(frozen=True)
class Group:
    """Describe modules of one parent that read inputs of one width: outputs and grids of each."""

    name: str
    layer: int
    columns: int
    rows: tuple[int, ...]
    grids: tuple[Encoding | None, ...]

    def weights(self, width: int, dtype: torch.dtype) -> list[Tensor]:
        """Return weights of the group's shapes, scaled to `width` inputs, with 2:4 zeros."""
        weights = []
        for rows in self.rows:
            count = max(round(rows * width / self.columns), 1)
            weight = torch.arange(1.0, count * width + 1).sin_().view(count, width).to(dtype)
            weight[:, ::2] = 0.0
            weights.append(weight)
        return weights


def _groups_of(run: Run) -> list[Group]:
    """Return the groups of a run, as far as names show them."""
    by_parent: dict[tuple[str, int], list[torch.nn.Module]] = {}
    for module, name in run.names.items():
        columns = module.get_parameter("weight").shape[1]
        by_parent.setdefault((name.rpartition(".")[0], columns), []).append(module)
    groups = []
    for (parent, columns), modules in by_parent.items():
        layer = next((int(part) for part in parent.split(".") if part.isdecimal()), 0)
        rows = tuple(module.get_parameter("weight").shape[0] for module in modules)
        grids = tuple(run.quantizer.grids.get(module) for module in modules)
        groups.append(Group(run.names[modules[0]], layer, columns, rows, grids))
    return groups


@dataclass
class Forecast:
    """Count the bytes of a run, by group."""

    entry: PruningEntry
    groups: Sequence[Group]  # in the order of the run
    hidden: int  # width of the residual stream
    dtype: torch.dtype  # of weights and activations
    by_layer: bool  # whether activations are kept between layers only
    batches: Sequence[tuple[int, int]]  # rows and length of each batch of this rank
    attention: int = 0  # bytes of masks and positions of all batches
    forward: int = 0  # bytes at the peak of a forward pass of the largest batch

    def __post_init__(self) -> None:
        self.dense_target = self.entry.reconstruct == "dense" and not self.by_layer
        self._statistics_peaks: dict[Any, int] = {}

    @classmethod
    def of(
        cls, run: Run, model: PreTrainedModel, loader: CalibrationLoader | None, by_layer: bool
    ) -> Self:
        """Forecast a run on `loader`; None: before sampling, without a forward pass."""
        embedding: Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]
        batches = [(1, -(-run.entry.calibration.tokens // run.processes.count))]
        attention = forward = 0
        if loader is not None:
            batches = [(len(weights), weights.shape[1]) for weights in loader.token_weights]
            attention = _attention_numbers(model, batches) * embedding.element_size()
            forward = _forward_bytes(model, *max(batches, key=lambda b: b[0] * b[1] ** 2))
        hidden, groups = embedding.shape[1], _groups_of(run)
        return cls(
            run.entry, groups, hidden, embedding.dtype, by_layer, batches, attention, forward
        )

    def activations(self, number: int) -> int:
        """Return the bytes of activations that are kept while group `number` is pruned."""
        width = self.hidden
        if not self.by_layer:
            group, before = self.groups[number], self.groups[max(number - 1, 0)]
            width += group.columns
            if self.dense_target:  # its stream waits before a wider group (statistics.py)
                width += self.hidden + min(before.columns, group.columns)
        tokens = sum(rows * length for rows, length in self.batches)
        return tokens * width * self.dtype.itemsize + self.attention

    def work(self, number: int) -> int:
        """Return the bytes of statistics with a forward pass, or of the solver."""
        group = self.groups[number]
        widths = []
        if self.by_layer:  # the statistics of a layer's groups live together
            widths = [g.columns for g in self.groups if g.layer == group.layer and g is not group]
        hessians = _FLOAT32 * sum(width**2 for width in widths)
        summed = _FLOAT32 * sum(map(Hessian.numbers_of_shard, widths))
        sizes = [grid.group_size or 1 for grid in group.grids if grid is not None]
        pattern = self.entry.pattern
        multiple = math.lcm(*sizes, pattern.m if pattern and pattern.m else 1)

        def peak(peaks: dict[Any, int], key: Any, rehearse: Callable[[Group, int], int]) -> int:
            if key not in peaks:
                peaks[key] = widened_peak(partial(rehearse, group), group.columns, multiple)
            return peaks[key]

        shape = group.columns, group.rows, group.grids
        solver = (solver_options(self.entry), pattern, self.dtype, self.dense_target)
        statistics = peak(self._statistics_peaks, shape, self._statistics)
        solving = peak(_SOLVER_PEAKS, (shape, solver), self._solver)
        return hessians + max(summed + statistics + self.forward, solving)

    def _statistics(self, group: Group, width: int) -> int:
        weights = group.weights(width, self.dtype)
        tokens = min(max(rows * length for rows, length in self.batches), ROWS)
        x = torch.ones(tokens, width, dtype=self.dtype)
        with LiveBytes() as live:
            statistics = Statistics(width, "cpu", weights if self.dense_target else None)
            for _ in range(2):
                statistics.add(x, torch.ones(tokens), x)
                statistics.end_shards(1)
        return live.peak

    def _solver(self, group: Group, width: int) -> int:
        weights = group.weights(width, self.dtype)
        with LiveBytes() as live:
            problem = Problem(
                [w.float() for w in weights] if self.entry.quantization else weights,
                torch.eye(width) + 1.0 / width,
                [self.entry.pattern or Pattern.unstructured(0.5)] * len(weights),
                [f"rehearsal of {group.name}"] * len(weights),
                [torch.zeros(len(w), width) for w in weights] if self.dense_target else None,
                tokens=1,
            )
            solved = solve_many([problem], solver_options(self.entry))
            if self.entry.quantization:
                quantize_many(solved, [problem.hessian], [group.grids], dtype=self.dtype)
        return live.peak

    def check(self, onload: torch.device, offload: torch.device, processes: int = 1) -> None:
        """Refuse a run that takes more memory than is free; `processes` share it (RacError)."""
        for device in dict.fromkeys((onload, offload)):
            gaps, shares = (HEAP_GAPS, processes) if device.type == "cpu" else (1.0, 1)
            needs = []
            with Phase("forecast of the memory", len(self.groups), unit="groups") as phase:
                for i in range(len(self.groups)):
                    work = int(gaps * self.work(i)) * (device == onload)
                    needs.append(work + self.activations(i) * (device == offload))
                    phase.advance()
            needed = max(needs)
            group = self.groups[needs.index(needed)].name
            message = f"pruning {group} needs {_gib(needed)} on {device} next to the model"
            free = free_bytes(device)
            if free is not None and needed > free // shares:
                now = self.entry.calibration
                raise RacError(
                    f"{message}, and {_gib(free // shares)} are free: set lower calibration.tokens "
                    f"(now {now.tokens:,}), calibration.batch_tokens (now {now.batch_tokens:,}) or "
                    f"preset: paper (activations between layers only), or add {group} to ignore"
                )
            logger.info(message)
            if device.type == "cpu":
                expect_growth(needed)


def _attention_numbers(model: PreTrainedModel, batches: Sequence[tuple[int, int]]) -> int:
    """Return how many numbers of masks and positions upstream's cache keeps."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None) or 1
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    kinds = len(set(getattr(config, "layer_types", None) or ["full_attention"]))
    return sum(rows * length * (kinds * length + 2 * width) for rows, length in batches)


def _forward_bytes(model: PreTrainedModel, rows: int, length: int) -> int:
    """Return the peak bytes of a forward pass under eager attention; 0 if it needs data."""
    try:
        with (
            without_data(model, attn_implementation="eager") as fake,
            calibration_forward_context(fake),
            LiveBytes() as live,
        ):
            input_of_head(fake, torch.zeros(rows, length, dtype=torch.long))
    except (RuntimeError, RacError) as error:
        logger.info(f"the memory of a forward pass is not counted ({error})")
        return 0
    return live.peak


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB ({count:,} bytes)"
