"""The traces of a store that may be calibrated on, and the traces that are held out of it."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from rac_modifier.calibration.mixture import CalibrationSequence, trace_sequence
from rac_modifier.calibration.token_weights import find_weighting, mean_one_factor
from rac_modifier.sampling.thinking import thinking_length
from rac_modifier.settings.calibration import CalibrationSettings
from rac_modifier.settings.traces import SelectSettings
from rac_modifier.traces.grading import Judge
from rac_modifier.traces.records import Trace
from rac_modifier.traces.selection import Selection, select, without_repeats
from rac_modifier.traces.store import TraceStore

_HELD_OUT_PROMPTS = 4  # at least, so that an unusual trace does not decide the result


class HoldOut:
    """Keeps the first prompts of a store out of calibration, each with all its samples.

    It takes at least `tokens` tokens and at least four prompts; 0 tokens hold out nothing. A prompt
    that comes again later is held out again, so the same question in two rows of a data set never
    lies on both sides. The first prompts count, so a store that grows holds out the same ones.
    """

    def __init__(self, tokens: int):
        self.held: list[Trace] = []
        self._tokens = tokens

    def others(self, traces: Iterable[Trace]) -> Iterator[Trace]:
        """Yield the traces that are not held out; `held` is complete when all have been read."""
        prompts: set[tuple[int, ...]] = set()
        count = 0
        for trace in traces:
            enough = count >= self._tokens and (
                len(prompts) >= _HELD_OUT_PROMPTS or not self._tokens
            )
            if enough and trace.prompt_ids not in prompts:
                yield trace
                continue
            prompts.add(trace.prompt_ids)
            self.held.append(trace)
            count += trace.tokens


class TracePool:
    """The traces that a selection keeps of a store: ids and lengths in memory, not their tokens.

    Attributes:
        lengths: tokens of each kept trace, prompt and completion.
        selection: how many traces were kept, and why the others were not.
        held_out: the first traces of the store, kept out whatever the selection is.
        reserved: the traces after them, kept out for training after pruning.
        repeated_tokens: tokens of the store that are cut because they repeat what precedes them.
    """

    def __init__(
        self,
        store: TraceStore,
        settings: SelectSettings,
        judge: Judge,
        tokenizer: Any,
        calibration: CalibrationSettings,
        held_out_tokens: int = 0,
        reserved_tokens: int = 0,
    ):
        self.store = store
        self.selection = Selection(settings)
        self.lengths = array("q")
        self._judge, self._tokenizer, self._calibration = judge, tokenizer, calibration
        self._ids: list[str] = []
        hold_out, reserve = HoldOut(held_out_tokens), HoldOut(reserved_tokens)
        self.repeated_tokens = store.counts.tokens
        candidates = reserve.others(hold_out.others(self._counted(map(without_repeats, store))))
        for trace in select(candidates, self.selection, judge):
            self.lengths.append(trace.tokens)
            self._ids.append(trace.id)
        self.held_out, self.reserved = tuple(hold_out.held), tuple(reserve.held)

    def _counted(self, traces: Iterable[Trace]) -> Iterator[Trace]:
        for trace in traces:
            self.repeated_tokens -= trace.tokens
            yield trace

    def usable_tokens(self) -> int:
        """Count the tokens of all kept traces, each cut to `max_sequence_tokens`."""
        return sum(map(self._cut_length, self.lengths))

    @property
    def kept_out_tokens(self) -> int:
        """Tokens of the traces that are held out or reserved."""
        return sum(trace.tokens for trace in (*self.held_out, *self.reserved))

    def draw(self, part: str, tokens: int) -> list[CalibrationSequence]:
        """Draw traces of `tokens` tokens over the whole pool; only these are read into memory.

        The order depends on the seed and on the name of the part alone. Returns fewer tokens if the
        pool has fewer.
        """
        count = len(self.lengths)
        places: dict[str, int] = {}  # by id, the place in the order
        for index in random.Random(f"{self._calibration.seed}/{part}").sample(range(count), count):
            if tokens <= 0:
                break
            places[self._ids[index]] = len(places)
            tokens -= self._cut_length(self.lengths[index])
        return self._read(places)

    def _read(self, places: dict[str, int]) -> list[CalibrationSequence]:
        weighting = find_weighting(self._calibration.trace_weighting, self._judge.is_right)
        drawn: dict[int, CalibrationSequence] = {}
        for trace in map(without_repeats, self.store):
            if (place := places.get(trace.id)) is not None:
                weight = 1.0 if weighting is None else weighting(trace)
                drawn[place] = trace_sequence(trace, self._answer_start(trace), weight)
        sequences = [drawn[place] for place in range(len(places))]
        if weighting is None:
            return sequences
        factor = mean_one_factor([(s.weight, len(s.ids)) for s in sequences])
        return [replace(s, weight=s.weight * factor) for s in sequences]

    def _cut_length(self, length: int) -> int:
        return min(length, self._calibration.max_sequence_tokens or length)

    def _answer_start(self, trace: Trace) -> int | None:
        if self._calibration.answer_weight is None:
            return None
        return len(trace.prompt_ids) + thinking_length(self._tokenizer, trace.completion_ids)
