"""The traces of a store that are calibrated on, without holding them all in memory."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rac_modifier.calibration.held_out import HoldOut
from rac_modifier.calibration.mixture import CalibrationSequence, trace_sequence
from rac_modifier.calibration.weighting import find_weighting, scaled
from rac_modifier.sampling.thinking import thinking_length
from rac_modifier.settings.calibration import CalibrationSettings
from rac_modifier.settings.traces import SelectSettings
from rac_modifier.traces.grading import Judge
from rac_modifier.traces.selection import Selection, select
from rac_modifier.traces.store import Trace, TraceStore


class TracePool:
    """What a selection keeps of a store: ids and lengths in memory, the rest read again when it is taken.

    Attributes:
        lengths: tokens of each kept trace, prompt and completion.
        selection: what was kept of the others and why the rest was not.
        held_out: the first traces of the store, kept out whatever the selection.
    """

    def __init__(
        self,
        store: TraceStore,
        settings: SelectSettings,
        judge: Judge,
        tokenizer: Any,
        calibration: CalibrationSettings,
        held_out_tokens: int = 0,
    ):
        self.store = store
        self.selection = Selection(settings)
        self.lengths = array("q")
        self._judge, self._tokenizer, self._calibration = judge, tokenizer, calibration
        self._ids: list[str] = []
        hold_out = HoldOut(held_out_tokens)
        for trace in select(hold_out.others(store), self.selection, judge):
            self.lengths.append(trace.tokens)
            self._ids.append(trace.id)
        self.held_out = tuple(hold_out.held)

    def usable_tokens(self) -> int:
        """Tokens of all that is kept, as it will be cut."""
        longest = self._calibration.max_sequence_tokens
        return sum(min(length, longest or length) for length in self.lengths)

    @property
    def held_out_tokens(self) -> int:
        """Tokens of the traces that are held out."""
        return sum(trace.tokens for trace in self.held_out)

    def take(self, indices: Sequence[int]) -> list[CalibrationSequence]:
        """These traces as sequences, in this order; memory holds no others."""
        wanted = {self._ids[index]: place for place, index in enumerate(indices)}
        weighting = find_weighting(self._calibration.trace_weighting, self._judge.is_right)
        found: dict[int, CalibrationSequence] = {}
        for trace in self.store:
            if (place := wanted.get(trace.id)) is not None:
                weight = 1.0 if weighting is None else weighting(trace)
                found[place] = trace_sequence(trace, self._answer_start(trace), weight)
        sequences = [found[place] for place in range(len(indices))]
        if weighting is None:
            return sequences
        factor = scaled([(s.weight, len(s.ids)) for s in sequences])
        return [replace(s, weight=s.weight * factor) for s in sequences]

    def _answer_start(self, trace: Trace) -> int | None:
        if self._calibration.answer_weight is None:
            return None
        return len(trace.prompt_ids) + thinking_length(self._tokenizer, trace.completion_ids)
