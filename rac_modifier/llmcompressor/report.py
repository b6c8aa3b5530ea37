"""What a run says while it prunes, and what its record holds: time per group, and the tokens of routed experts."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from llmcompressor.entrypoints.oneshot import Oneshot
from loguru import logger
from tqdm import tqdm

from rac_modifier.errors import RacError
from rac_modifier.llmcompressor.experts import find_experts
from rac_modifier.pruning.routed_tokens import ExpertTokens
from rac_modifier.settings.pruning import EXPERT_FLOOR, PruningSettings

_LINES = 10  # log lines per run where there is no terminal
_STARVED = 5  # starved experts per log line; the record has all
_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} modules [{elapsed}{postfix}]"  # without tqdm's own estimate


class Progress:
    """Count the modules that are pruned. A group's time runs from the end of the group before it, forward passes included.

    The time left is the sum over the modules that are left: the mean time of modules of that shape, or, where none of that shape
    is done, the mean time per weight. A terminal shows a progress bar, a log file some ten lines per run.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, int]],
        clock: Callable[[], float] = time.monotonic,
        *,
        shown: bool = True,
        prunes: bool = True,
    ):
        self._verb, description = ("pruned", "pruning") if prunes else ("quantized", "quantizing")
        self._left, self._clock = dict(shapes), clock
        self._begin = self._last = clock()
        self._times: list[tuple[tuple[int, int], float]] = []
        self._groups: list[dict[str, Any]] = []
        self._bar = tqdm(
            total=len(shapes),
            desc=description,
            bar_format=_BAR,
            disable=None if shown and shapes else True,
        )
        self._next_line, self._restored = 1, 0

    def done(self, names: Sequence[str]) -> None:
        """Count a group of modules that was pruned."""
        now = self._clock()
        seconds, self._last = now - self._last, now
        shapes = [self._left.pop(name) for name in names]
        weights = sum(_size(shape) for shape in shapes)
        self._times += [(shape, seconds * _size(shape) / weights) for shape in shapes]
        self._groups.append({"modules": list(names), "seconds": round(seconds, 3)})
        self._show(len(names))

    def restored(self, name: str) -> None:
        """Count a module that an earlier run had pruned; its time says nothing about the others."""
        del self._left[name]
        self._restored += 1
        self._last = self._clock()
        self._bar.update()

    def close(self) -> None:
        """End the progress bar."""
        self._bar.close()

    @property
    def seconds_left(self) -> float:
        """Return the estimate for the modules that are left; 0.0 before any is done."""
        if not self._times:
            return 0.0
        weights = sum(_size(shape) for shape, _ in self._times)
        per_weight = sum(seconds for _, seconds in self._times) / weights
        by_shape: dict[tuple[int, int], list[float]] = {}
        for shape, seconds in self._times:
            by_shape.setdefault(shape, []).append(seconds)
        mean = {shape: sum(seconds) / len(seconds) for shape, seconds in by_shape.items()}
        return sum(mean.get(shape, per_weight * _size(shape)) for shape in self._left.values())

    def record(self) -> dict[str, Any]:
        """Return for the run record the seconds of all groups and of each, without what an earlier run had pruned."""
        restored = {"restored_modules": self._restored} if self._restored else {}
        return {"seconds": round(self._last - self._begin, 3), **restored, "groups": self._groups}

    def _show(self, count: int) -> None:
        left = _readable(self.seconds_left)
        self._bar.set_postfix_str(f"{left} left", refresh=False)
        self._bar.update(count)
        done = len(self._times) + self._restored
        total = len(self._left) + done
        if self._bar.disable and done * _LINES >= self._next_line * total:
            self._next_line = done * _LINES // total + 1
            logger.info(f"{self._verb} {done} of {total} modules, about {left} left")


def _size(shape: tuple[int, int]) -> int:
    return shape[0] * shape[1]


def _readable(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


class ExpertReport:
    """The tokens that the routed experts of a run were calibrated on, for the log and the record; empty without experts."""

    def __init__(
        self, entry: PruningSettings, model: torch.nn.Module, names: Mapping[torch.nn.Module, str]
    ):
        self._entry, self._tokens = entry, entry.experts
        self._why: str | None = None
        self._has_experts = bool(find_experts(model, names))
        self._layers: dict[str, dict[str, Any]] = {}

    def check(self, oneshot: Oneshot | None) -> None:
        """Refuse settings about experts that contradict `oneshot`, or that a model without experts does not use.

        Raises:
            RacError: naming the setting and its value.
        """
        entry = self._entry
        for name, default in (("experts", "routed"), ("expert_floor", EXPERT_FLOOR)):
            value = getattr(entry, name)
            if value != default and name in entry.model_fields_set and not self._has_experts:
                raise RacError(
                    f"{name}: {value!r} has no effect here: no routed expert of this model is pruned; leave it out"
                )
        routed_only = oneshot is not None and not oneshot.dataset_args.moe_calibrate_all_experts
        if self._has_experts and entry.experts == "all" and routed_only:
            raise RacError(
                "oneshot was given moe_calibrate_all_experts=False, and the recipe has experts: all; leave one of them out"
            )

    def use_order(self, order: str, why: str) -> None:
        """Record that each expert gets all tokens where a run goes layer by layer."""
        if order == "group" or not self._has_experts:
            return
        self._tokens, self._why = "all", f"layer by layer ({why})"
        if self._entry.experts != "all" and self._entry.order != "layer":
            logger.warning(
                f"experts: {self._entry.experts} needs the model cut between its modules, which is not possible here "
                f"({why}): each expert is calibrated on all tokens instead, which keeps less accuracy"
            )

    def add(self, name: str, tokens: Mapping[str, ExpertTokens]) -> None:
        """Record the tokens of each expert of the layer `name`, by the expert's name."""
        routed = [counts.routed for counts in tokens.values()]
        least, median, most = min(routed), statistics.median(routed), max(routed)
        starved = {e: counts for e, counts in tokens.items() if counts.added}
        starved = starved if self._tokens == "routed" else {}
        self._layers[name] = {
            "experts": len(tokens),
            "routed": {"least": least, "median": median, "most": most},
            "starved": {
                expert: {"routed": counts.routed, "added": counts.added}
                | ({"evenly": True} if counts.evenly else {})
                for expert, counts in starved.items()
            },
        }
        logger.info(
            f"{name}: {least:,} to {most:,} tokens are routed to each of {len(tokens)} experts, median {median:,}"
        )
        if starved:
            self._warn(name, starved)

    def _warn(self, name: str, starved: Mapping[str, ExpertTokens]) -> None:
        shown = ", ".join(
            f"{expert.rpartition('.')[2]} ({counts.routed:,})"
            for expert, counts in list(starved.items())[:_STARVED]
        )
        more = f" and {len(starved) - _STARVED} more" if len(starved) > _STARVED else ""
        others = "those nearest to being so"
        if any(counts.evenly for counts in starved.values()):
            others = "others, evenly spread since its router is not known,"
        logger.warning(
            f"{name}: fewer than expert_floor ({self._entry.expert_floor:,}) tokens are routed to the experts {shown}{more}; "
            f"{others} were added to calibrate them. More traces (calibration.tokens) would help"
        )

    def record(self) -> dict[str, Any]:
        """Return the entry of the run record; empty without routed experts."""
        if not self._has_experts:
            return {}
        floor = {"floor": self._entry.expert_floor} if self._tokens == "routed" else {}
        why = {"why": self._why} if self._why else {}
        return {"experts": {"calibrated on": self._tokens, **why, **floor, "layers": self._layers}}


def strict_json(record: Any) -> Any:
    """Return a copy of a record in which nan and infinity are their names, which JSON lacks: a record never costs the result."""
    if isinstance(record, Mapping):
        return {key: strict_json(value) for key, value in record.items()}
    if isinstance(record, (list, tuple)):
        return [strict_json(value) for value in record]
    if isinstance(record, float) and not math.isfinite(record):
        return str(record)
    return record
