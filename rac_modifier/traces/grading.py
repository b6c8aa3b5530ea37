"""Whether the final answer of a trace is right: by comparison with the reference, or by the verifier of its task."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

from transformers import PreTrainedTokenizerBase

from rac_modifier.errors import RacError
from rac_modifier.problems.answer_checker import WORKERS, check_answer
from rac_modifier.problems.answers import equal_answers, extract_answer
from rac_modifier.problems.source import gym_item
from rac_modifier.traces.records import StoreHeader, Trace

_TOGETHER = 256  # traces held in memory while their answers are checked


class Judge:
    """Judges the traces of one store and caches each verdict, so that reading the store again needs no more checks.

    Answers to problems of reasoning-gym are scored by their task. All others are compared as text, as integers or as
    mathematics. Both run in processes that are ended where one answer takes too long; that answer then counts as wrong.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, header: StoreHeader):
        self._tokenizer, self._header = tokenizer, header
        self._verdicts: dict[str, bool] = {}

    def __call__(self, traces: Iterable[Trace]) -> Iterator[tuple[Trace, bool]]:
        """Each trace with whether it is right, in order.

        Raises:
            RacError: a trace has no reference answer, or what checks it is not installed.
        """
        left = iter(traces)
        with ThreadPoolExecutor(WORKERS) as pool:
            while batch := list(islice(left, _TOGETHER)):
                yield from zip(batch, pool.map(self.is_right, batch), strict=True)

    def is_right(self, trace: Trace) -> bool:
        """The verdict on one trace."""
        if trace.id not in self._verdicts:
            self._verdicts[trace.id] = self._check(trace)
        return self._verdicts[trace.id]

    def _check(self, trace: Trace) -> bool:
        if trace.answer is None:
            raise RacError(
                f"trace {trace.id!r} has no reference answer, so it cannot be told whether it is right: name the column of the "
                "answers (problems.answer_column) in a new store, or select without answers"
            )
        answer = extract_answer(
            str(self._tokenizer.decode(list(trace.completion_ids), skip_special_tokens=True))
        )
        if answer is None:
            return False
        if item := gym_item(self._header.problems, self._header.sampling.seed, trace.problem_id):
            return check_answer("reasoning-gym", answer, *item)
        return equal_answers(answer, trace.answer)
