"""Check the final answer of a trace against the reference, or by the verifier of its task."""

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

_TOGETHER = 256  # traces in memory while their answers are checked


class Judge:
    """Judges the traces of a store and caches each verdict.

    Answers to problems of reasoning-gym are scored by their task. Other answers are compared as text,
    as integers or as mathematics. An answer that takes too long counts as wrong, and its process ends.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, header: StoreHeader):
        self._tokenizer, self._header = tokenizer, header
        self._verdicts: dict[str, bool] = {}

    def __call__(self, traces: Iterable[Trace]) -> Iterator[tuple[Trace, bool]]:
        """Yield each trace with its verdict, in order.

        Raises:
            RacError: a trace has no reference answer, or what checks it is not installed.
        """
        remaining = iter(traces)
        with ThreadPoolExecutor(WORKERS) as pool:
            while batch := list(islice(remaining, _TOGETHER)):
                yield from zip(batch, pool.map(self.is_right, batch), strict=True)

    def is_right(self, trace: Trace) -> bool:
        """Return the verdict on a trace."""
        if trace.id not in self._verdicts:
            self._verdicts[trace.id] = self._check(trace)
        return self._verdicts[trace.id]

    def _check(self, trace: Trace) -> bool:
        if trace.answer is None:
            raise RacError(
                f"trace {trace.id!r} has no reference answer, so it cannot be told whether it is "
                "right: name the column of the answers (problems.answer_column) in a new store, or "
                "select without answers"
            )
        answer = extract_answer(
            str(self._tokenizer.decode(list(trace.completion_ids), skip_special_tokens=True))
        )
        if answer is None:
            return False
        if item := gym_item(self._header.problems, self._header.sampling.seed, trace.problem_id):
            return check_answer("reasoning-gym", answer, *item)
        return equal_answers(answer, trace.answer)
