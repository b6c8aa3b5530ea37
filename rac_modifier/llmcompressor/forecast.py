"""Forecast the memory that pruning takes next to the model, and refuse a run that does not fit before hours of work.

A run goes from group to group: modules that read the same input of d columns. It holds

    activations   tokens (d + hidden) numbers: the input of the group and the residual stream; layer by layer the residual
                  stream alone; with the dense target the same of the dense model; masks and positions of attention
    statistics    Hessian and cross moment while batches are added and run
    solving       Hessian, factor, buffers of the solver and of rounding

Statistics, solver and a forward pass are rehearsed (rehearsal.py); activations are counted.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from llmcompressor.utils.helpers import calibration_forward_context
from loguru import logger
from transformers import PreTrainedModel

from rac_modifier.calibration.loader import CalibrationLoader
from rac_modifier.errors import RacError
from rac_modifier.llmcompressor.plan import Stage
from rac_modifier.llmcompressor.solving import solve_problems
from rac_modifier.model_tools import free_bytes
from rac_modifier.platform import HEAP_GAPS, expect_growth
from rac_modifier.pruning import sparsegpt
from rac_modifier.pruning.hessian import ROWS, Statistics, numbers_of_shard
from rac_modifier.pruning.solve import Problem
from rac_modifier.quantization.grid import Grid
from rac_modifier.recovery.hidden_states import input_of_head
from rac_modifier.rehearsal import LiveBytes, widened_peak, without_data
from rac_modifier.settings.entries import PruningEntry
from rac_modifier.settings.pattern import Pattern

_FLOAT32 = 4


@dataclass(frozen=True)
class Group:
    """Modules that read the same input.

    Attributes:
        name: of the first module.
        columns: inputs.
        rows: outputs of each module.
        grids: of each module, None where it is not rounded.
        layer: number of the decoder layer; layer by layer the statistics of its groups live at the same time.
        routed: whether they are experts that are calibrated on their own tokens.
    """

    name: str
    columns: int
    rows: tuple[int, ...]
    grids: tuple[Grid | None, ...]
    layer: int = 0
    routed: bool = False


@dataclass(frozen=True)
class Forecast:
    """What a run takes, by group.

    Attributes:
        entry: the recipe's.
        groups: in the order of the run.
        hidden: width of the residual stream.
        dtype: of weights and activations.
        tokens: of this process, with padding.
        batch: rows and length of the largest batch; (0, tokens) before the calibration set is there.
        attention: bytes of masks and positions of all batches.
        forward: bytes of a forward pass of the largest batch at its peak.
        by_layer: whether activations are kept between layers only.
    """

    entry: PruningEntry
    groups: Sequence[Group]
    hidden: int
    dtype: torch.dtype
    tokens: int
    batch: tuple[int, int]
    attention: int
    forward: int
    by_layer: bool

    @classmethod
    def of(
        cls,
        entry: PruningEntry,
        model: PreTrainedModel,
        groups: Sequence[Group],
        loader: CalibrationLoader | None,
        *,
        by_layer: bool,
        processes: int,
    ) -> Forecast:
        """Forecast a run on `loader`; None: before sampling, when a forward pass is not counted."""
        embedding: torch.Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]
        tokens = -(-entry.calibration.tokens // processes)
        batch, attention, forward = (0, min(tokens, entry.calibration.batch_tokens)), 0, 0
        if loader is not None:
            batches = [(len(weights), weights.shape[1]) for weights in loader.token_weights]
            tokens = sum(rows * length for rows, length in batches)
            batch = max(batches, key=lambda b: b[0] * b[1] ** 2)
            attention = _attention_bytes(model, batches) * embedding.element_size()
            forward = _forward_bytes(model, *batch)
        hidden, dtype = embedding.shape[1], embedding.dtype
        return cls(entry, groups, hidden, dtype, tokens, batch, attention, forward, by_layer)

    @property
    def dense_target(self) -> bool:
        """Return whether the dense model's activations are kept next to the pruned model's."""
        return self.entry.reconstruct == "dense" and not self.by_layer

    @property
    def widest(self) -> int:
        """Return the most columns that a group reads whose activations can be recomputed."""
        return max((group.columns for group in self.groups if not group.routed), default=0)

    def activations(self, number: int, *, recomputes: bool = False) -> int:
        """Return the bytes of activations that are kept while group `number` is pruned."""
        if self.by_layer:
            width = self.hidden
        else:
            group = self.groups[number]
            before = self.groups[max(number - 1, 0)]
            waits = not group.routed and before.columns < group.columns == self.widest
            width = self.hidden + (before.columns if recomputes and waits else group.columns)
            if self.dense_target:  # its stream waits before the widest group (streams.py)
                width += self.hidden + (before.columns if waits else group.columns)
                width += self.hidden if group.routed else 0
        return self.tokens * width * self.dtype.itemsize + self.attention

    def work(self, number: int) -> int:
        """Return the bytes of statistics with a forward pass, or of the solver, for group `number`."""
        group = self.groups[number]
        others = [g for g in self.groups if g.layer == group.layer and g is not group]
        summed = beside = 0
        if self.by_layer:
            beside = _FLOAT32 * sum(g.columns**2 for g in others)
            summed = beside + _FLOAT32 * sum(numbers_of_shard(g.columns) for g in others)
        statistics, solving = self._rehearsed[group.columns, group.rows, group.grids]
        return max(summed + statistics + self.forward, beside + solving)

    @cached_property
    def _rehearsed(self) -> dict[tuple[Any, ...], tuple[int, int]]:
        """The bytes of statistics and of the solver at their peaks, of each shape of group."""
        return {
            (g.columns, g.rows, g.grids): (
                self._rehearse(g, self._rehearse_statistics),
                self._rehearse(g, self._rehearse_solver),
            )
            for g in {(g.columns, g.rows, g.grids): g for g in self.groups}.values()
        }

    def _rehearse(self, group: Group, rehearse: Callable[[Group, int], int]) -> int:
        sizes = [g.group_size for g in group.grids if g is not None and g.group_size]
        m = self.entry.pattern.m if self.entry.pattern else 0
        return widened_peak(
            partial(rehearse, group), group.columns, math.lcm(*(n for n in (*sizes, m) if n))
        )

    def _rehearse_statistics(self, group: Group, width: int) -> int:
        weights = _weights(group, width, self.dtype)
        tokens = min(max(self.batch[0], 1) * self.batch[1], ROWS)
        x = torch.ones(tokens, width, dtype=self.dtype)
        with LiveBytes() as live:
            statistics = Statistics(width, "cpu", weights if self.dense_target else None)
            for _ in range(2):
                statistics.add(x, torch.ones(tokens), x)
                statistics.end_shards(1)
        return live.peak

    def _rehearse_solver(self, group: Group, width: int) -> int:
        weights = _weights(group, width, self.dtype)
        rows = [len(w) for w in weights]
        together = 1
        if self.entry.gains_at_once and group.routed:
            alike = sum(g.layer == group.layer and g.rows == group.rows for g in self.groups)
            together = min(
                sparsegpt.problems_per_batch(group.columns, sum(group.rows), torch.device("cpu")),
                alike,
            )
        with LiveBytes() as live:
            problem = Problem(
                [w.float() for w in weights] if self.entry.quantization else weights,
                torch.eye(width) + 1.0 / width,
                [self.entry.pattern or Pattern.unstructured(0.5)] * len(rows),
                [f"rehearsal of {group.name}"] * len(rows),
                [torch.zeros(r, width) for r in rows] if self.dense_target else None,
            )
            solve_problems(self.entry, [problem], [group.grids], self.dtype)
        return together * live.peak

    def on(
        self, device: torch.device, onload: torch.device, offload: torch.device, recomputes: bool
    ) -> tuple[int, Group]:
        """Return the most bytes that a group takes on `device`, and that group.

        Statistics and solver use `onload`, activations are kept on `offload`.
        """
        gaps = HEAP_GAPS if device.type == "cpu" else 1.0
        needs = [
            (gaps * self.work(i) if device == onload else 0)
            + (self.activations(i, recomputes=recomputes) if device == offload else 0)
            for i in range(len(self.groups))
        ]
        largest = max(range(len(needs)), key=needs.__getitem__)
        return int(needs[largest]), self.groups[largest]


def check_memory(
    forecast: Forecast,
    onload: torch.device,
    offload: torch.device,
    *,
    processes: int = 1,
    free: Callable[[torch.device], int | None] | None = None,
) -> int:
    """Refuse a run that takes more memory than is free, and log what it takes.

    Of several processes on one machine each has a device of its own, and an equal part of the host's memory.

    Returns:
        0 where activations fit; else the width of the inputs that are recomputed instead of kept (streams.py).

    Raises:
        RacError: naming the largest group, the bytes needed and free, and what to change.
    """

    def available(device: torch.device) -> int | None:
        bytes_free = (free or free_bytes)(device)
        return bytes_free // processes if bytes_free and device.type == "cpu" else bytes_free

    kept, recomputed = (forecast.on(offload, onload, offload, r)[0] for r in (False, True))
    room = available(offload)
    recomputes = room is not None and room < kept and recomputed < kept
    if recomputes and room is not None and recomputed <= room:
        logger.info(
            f"the inputs of the widest modules are computed twice instead of kept, since {_gib(room)} are free on {offload}: "
            f"that takes {_gib(kept - recomputed)} less and some more time, and the result is the same"
        )
    doing = "pruning" if forecast.entry.prunes else "quantizing"
    for device in dict.fromkeys((onload, offload)):
        needed, group = forecast.on(device, onload, offload, recomputes)
        bytes_free = available(device)
        message = f"{doing} {group.name} is predicted to need {_gib(needed)} on {device} next to the model"
        if bytes_free is None:
            logger.info(f"{message}; how much is free there is not known, so it is not checked")
        elif needed > bytes_free:
            steps = ", or ".join(_next_steps(forecast, group))
            raise RacError(f"{message}, and {_gib(bytes_free)} are free: {steps}")
        else:
            logger.info(f"{message}; {_gib(bytes_free)} are free")
        if device.type == "cpu":
            expect_growth(needed)
    return forecast.widest if recomputes else 0


def groups_of(
    names: Mapping[torch.nn.Module, str],
    grids: Mapping[torch.nn.Module, Grid],
    stages: Sequence[Stage] | None = None,
) -> list[Group]:
    """Return the groups of a run by group; without `stages` those that the names show: modules of one parent and width."""
    groups: list[tuple[list[torch.nn.Module], bool]] = []
    if stages is None:
        by_parent: dict[tuple[str, int], list[torch.nn.Module]] = {}
        for module, name in names.items():
            columns = module.get_parameter("weight").shape[1]
            by_parent.setdefault((name.rpartition(".")[0], columns), []).append(module)
        groups = [(modules, False) for modules in by_parent.values()]
    else:
        groups = [(g, stage.experts is not None) for stage in stages for g in stage.groups]
    shapes = []
    for modules, routed in groups:
        name = names[modules[0]]
        layer = next((int(part) for part in name.split(".") if part.isdecimal()), 0)
        rows = tuple(module.get_parameter("weight").shape[0] for module in modules)
        columns = modules[0].get_parameter("weight").shape[1]
        of_modules = tuple(grids.get(module) for module in modules)
        shapes.append(Group(name, columns, rows, of_modules, layer, routed))
    return shapes


def _weights(group: Group, width: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return weights of the group's shapes, scaled to `width` inputs; half of them are zero, in a 2:4 pattern."""
    weights = []
    for rows in group.rows:
        count = max(round(rows * width / group.columns), 1)
        weight = torch.arange(1.0, count * width + 1).sin_().view(count, width).to(dtype)
        weight[:, ::2] = 0.0
        weights.append(weight)
    return weights


def _attention_bytes(model: PreTrainedModel, batches: Sequence[tuple[int, int]]) -> int:
    """Return how many numbers of masks and positions upstream's cache keeps: a mask per kind of attention layer."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None) or 1
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    kinds = len(set(getattr(config, "layer_types", None) or ["full_attention"]))
    return sum(rows * length * (kinds * length + 2 * width) for rows, length in batches)


def _forward_bytes(model: PreTrainedModel, rows: int, length: int) -> int:
    """Return the bytes of a forward pass at its peak, under eager attention as in calibration.

    Returns 0 and logs it where the model does not run without data (routed experts).
    """
    try:
        with without_data(model, attn_implementation="eager") as fake, contextlib.ExitStack() as s:
            s.enter_context(calibration_forward_context(fake))
            with LiveBytes() as live:
                input_of_head(fake, torch.zeros(rows, length, dtype=torch.long))
    except (RuntimeError, RacError) as error:
        logger.info(
            f"a forward pass of {type(model).__name__} is not counted in the memory that is needed ({error})"
        )
        return 0
    return live.peak


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB ({count:,} bytes)"


def _next_steps(forecast: Forecast, group: Group) -> list[str]:
    """Return what would help: fewer activations, smaller batches, a lighter method."""
    rows, length = forecast.batch
    steps = [
        f"set a lower calibration.tokens ({forecast.tokens:,} tokens are calibrated on now)",
        f"set calibration.batch_tokens below {max(rows, 1) * length:,}",
    ]
    if forecast.dense_target:
        steps.append("set reconstruct: pruned, which keeps one model's activations instead of two")
    if not forecast.by_layer:
        steps.append("set preset: paper, which keeps activations between layers only")
    return [*steps, f"add {group.name} to ignore"]
