"""Choose traces of a store, by their answers too; by default all."""

from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

from transformers import PreTrainedTokenizerBase

from rac_modifier.errors import RacError
from rac_modifier.problems.answer_checker import WORKERS, check_answer
from rac_modifier.problems.answers import completion_text, equal_answers, extract_answer
from rac_modifier.problems.source import gym_item
from rac_modifier.settings.traces import SelectSettings
from rac_modifier.traces.records import StoreHeader, Trace

_TOGETHER = 256  # traces in memory while their answers are checked


class Judge:
    """Judges traces and caches each verdict; an answer that takes too long to check is wrong."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, header: StoreHeader):
        self._tokenizer, self._header = tokenizer, header
        self._verdicts: dict[str, bool] = {}

    def __call__(self, traces: Iterable[Trace]) -> Iterator[tuple[Trace, bool]]:
        """Yield each trace with its verdict, in order."""
        remaining = iter(traces)
        with ThreadPoolExecutor(WORKERS) as pool:
            while batch := list(islice(remaining, _TOGETHER)):
                for trace, right in zip(batch, pool.map(self._verdict, batch), strict=True):
                    self._verdicts[trace.id] = right
                    yield trace, right

    def _verdict(self, trace: Trace) -> bool:
        if trace.id in self._verdicts:
            return self._verdicts[trace.id]
        if trace.answer is None:
            raise RacError(
                f"trace {trace.id!r} has no reference answer: name the column of the answers "
                "(problems.answer_column) in a new store, or select without answers"
            )
        answer = extract_answer(completion_text(self._tokenizer, trace.completion_ids))
        if answer is None:
            return False
        if item := gym_item(self._header.problems, self._header.sampling.seed, trace.problem_id):
            return check_answer("reasoning-gym", answer, *item)
        return equal_answers(answer, trace.answer)


class Selection:
    """Filters traces by settings, and counts the dropped traces by reason."""

    def __init__(self, settings: SelectSettings):
        self.settings = settings
        self.total = 0
        self.kept = 0
        self.dropped: Counter[str] = Counter()

    def keep(self, traces: Iterable[Trace], judge: Judge) -> Iterator[Trace]:
        """Yield the selected traces in order; answers are judged only if the settings need it."""
        judged: Iterable[tuple[Trace, bool]] = ((trace, True) for trace in traces)
        if self.settings.answers == "correct":
            judged = judge(traces)
        longest = self.settings.max_tokens
        for trace, right in judged:
            self.total += 1
            if self.settings.finished and trace.finish_reason != "stop":
                self.dropped["unfinished"] += 1
            elif longest is not None and len(trace.completion_ids) > longest:
                self.dropped["too long"] += 1
            elif not right:
                self.dropped["wrong"] += 1
            else:
                self.kept += 1
                yield trace

    def describe(self) -> str:
        """Describe the counts, for example "kept 812 of 1,024: 150 wrong, 62 unfinished"."""
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.dropped.most_common())
        return f"kept {self.kept:,} of {self.total:,}" + (f": {reasons}" if reasons else "")

    def as_dict(self) -> dict[str, int | dict[str, int]]:
        """Return the counts for the run record."""
        return {"kept": self.kept, "of": self.total, "dropped": dict(self.dropped.most_common())}
