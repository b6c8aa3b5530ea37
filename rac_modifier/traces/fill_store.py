"""Fill a store: which problems to ask next, and the order in which their traces are stored.

The store holds the traces in the order of their problems, whatever the order in which an engine
finishes them. So the file is the same for any number of servers and kills. A trace that is finished
before an earlier one goes to a second store (`x.pending.jsonl`), so that a kill does not lose it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from loguru import logger
from tqdm import tqdm

from rac_modifier.errors import RacError
from rac_modifier.problems.source import Problem
from rac_modifier.sampling.engine import Completion, Engine, Failure, Prompt
from rac_modifier.traces.failures import (
    FailedProblem,
    append_failures,
    failures_path,
    read_failures,
)
from rac_modifier.traces.store import Trace, TraceStore

_FAILURES_OF_AN_OUTAGE = 16  # without a success between them; fewer are bad problems
_NO_LIMIT = 2**62
_LONGEST_QUEUE = 256  # entries, while stored traces are passed over


@dataclass
class _Entry:
    """A sample of a problem on its way into the store; `tokens` is 0 until they are known."""

    id: str
    problem: Problem
    tokens: int = 0
    settled: bool = False
    trace: Trace | None = None
    """Finished, but not stored yet."""

    def failed(self, reason: str) -> FailedProblem:
        return FailedProblem(self.id, self.problem.question, reason)


def pending_path(store: Path) -> Path:
    """Return traces.pending.jsonl for traces.jsonl."""
    return store.with_name(f"{store.stem}.pending.jsonl")


class FillStore:
    """Fills a store from an engine.

    Args:
        store: open to append to.
        engine: completes what neither the store nor its side files hold; it is connected when needed.
        problems: in order; the store's header has the samples per problem.
        render: returns the token ids of a problem's prompt.
        refuse: returns why a prompt of so many tokens is not sampled; None: it is.
    """

    def __init__(
        self,
        store: TraceStore,
        engine: Engine,
        problems: Iterator[Problem],
        render: Callable[[Problem], list[int]],
        refuse: Callable[[int], str | None] = lambda length: None,
    ):
        self._store, self._engine, self._render, self._refuse = store, engine, render, refuse
        samples = store.header.sampling.samples_per_problem
        self._samples = (
            (f"{problem.id}#{i}", problem) for problem in problems for i in range(samples)
        )
        self._queue: deque[_Entry] = deque()
        self._asked: dict[str, _Entry] = {}
        self._total = 0  # tokens of the entries that have left the queue
        self._known = 0  # the same, plus the known tokens of entries in the queue
        self._failed = {failed.id for failed in read_failures(store.path)}
        # Failures since the last success are not written yet: they may be an outage, which must not
        # change the order. They hold up later entries.
        self._doubtful: list[tuple[_Entry, FailedProblem]] = []
        self._pending: TraceStore | None = None
        self._early: dict[str, Trace] = {}
        if pending_path(store.path).exists():
            self._pending = self._open_pending()
            self._early = {trace.id: trace for trace in self._pending if trace.id not in store}

    def run(self, tokens: int | None, progress: bool) -> int:
        """Store the shortest run of problems that holds `tokens` (None: all problems).

        Returns:
            The tokens of that run; fewer than `tokens` if the problems end.

        Raises:
            RacError: no room on the disk, or an engine that cannot go on; stored traces stay.
        """
        goal, tokens = tokens, _NO_LIMIT if tokens is None else tokens
        batches = self._engine.iter_completions(self._batches(tokens))
        try:
            with tqdm(
                total=goal,
                desc="traces",
                unit="tok",
                unit_scale=True,
                disable=None if progress else True,
            ) as bar:
                while self._total < tokens and (completions := next(batches, None)) is not None:
                    self._receive(completions, tokens)
                    bar.update(min(self._total, tokens) - bar.n)
                self._record_doubtful()
                self._store_in_order(tokens)
                bar.update(min(self._total, tokens) - bar.n)
            return self._total
        finally:
            self._close_pending()

    @property
    def failed(self) -> int:
        """Number of problems that failed, in this run and before."""
        return len(self._failed)

    def _batches(self, tokens: int) -> Iterator[list[Prompt]]:
        """Yield the prompts to complete while the budget may need more; stored ones are passed over."""
        while self._known < tokens:
            batch = [
                self._entry(*sample) for sample in islice(self._samples, self._engine.batch_size)
            ]
            if not batch:
                return
            self._queue.extend(batch)
            needed = self._is_needed(batch, tokens - self._known)
            self._known += sum(entry.tokens for entry in batch)
            if needed and (prompts := self._prompts(batch)):
                yield prompts
            elif len(self._queue) >= _LONGEST_QUEUE:
                self._store_in_order(tokens)

    def _entry(self, trace_id: str, problem: Problem) -> _Entry:
        if trace_id in self._store:
            return _Entry(trace_id, problem, self._store.tokens_of(trace_id), settled=True)
        if early := self._early.pop(trace_id, None):
            return _Entry(trace_id, problem, early.tokens, settled=True, trace=early)
        return _Entry(trace_id, problem, settled=trace_id in self._failed)

    @staticmethod
    def _is_needed(batch: list[_Entry], tokens: int) -> bool:
        for entry in batch:
            if tokens <= 0:
                return False
            if not entry.settled:
                return True
            tokens -= entry.tokens
        return False

    def _prompts(self, batch: list[_Entry]) -> list[Prompt]:
        """Return the prompts of a whole batch, also if part of it is stored.

        Rounding depends on the shape of a batch, and a resumed run must give the same traces.
        """
        self._connect()
        prompts: list[Prompt] = []
        refused: list[FailedProblem] = []
        for entry in batch:
            ids = self._render(entry.problem)
            if (reason := self._refuse(len(ids))) is None:
                prompts.append(Prompt(entry.id, tuple(ids)))
                if not entry.settled:
                    self._asked[entry.id] = entry
            elif not entry.settled:
                entry.settled = True
                refused.append(entry.failed(reason))
        self._record_failures(refused)
        return prompts

    def _connect(self) -> None:
        self._engine.connect()
        filled = self._store.header.engine.kind
        if filled != self._engine.kind:
            way_out = (
                "give its servers (traces.engine)"
                if filled != "transformers"
                else "leave traces.engine out"
            )
            raise RacError(
                f"trace store {str(self._store.path)!r} holds too few tokens, and was filled by "
                f"another engine ({filled}, not {self._engine.kind}), which draws other samples: "
                f"{way_out}, or name another path"
            )

    def _receive(self, completions: Sequence[Completion], tokens: int) -> None:
        outage: RacError | None = None
        for completion in completions:
            entry = self._asked.pop(completion.prompt.key, None)
            if entry is None:
                continue  # stored before; sampled again for the shape of its batch
            if isinstance(completion.outcome, Failure):
                self._doubtful.append((entry, entry.failed(completion.outcome.reason)))
                if len(self._doubtful) >= _FAILURES_OF_AN_OUTAGE:
                    outage = self._outage(completion.outcome)
                continue
            self._record_doubtful()  # a success: earlier failures were bad problems, not an outage
            entry.trace = Trace(
                id=entry.id,
                problem_id=entry.problem.id,
                prompt_ids=completion.prompt.ids,
                completion_ids=completion.outcome.ids,
                finish_reason=completion.outcome.finish_reason,
                seed=self._store.header.sampling.seed,
                question=entry.problem.question,
                answer=entry.problem.answer,
            )
            entry.tokens, entry.settled = entry.trace.tokens, True
            self._known += entry.tokens
        self._store_in_order(tokens)
        self._keep_early()
        if outage is not None:
            raise outage

    def _outage(self, last: Failure) -> RacError:
        return RacError(
            f"{len(self._doubtful)} completions in a row failed, the last one: {last.reason}. What was "
            f"finished before is kept in {str(self._store.path)!r}: see to the servers, then run again "
            "to go on from there"
        )

    def _record_doubtful(self) -> None:
        doubtful, self._doubtful = self._doubtful, []
        self._record_failures([failed for _, failed in doubtful])
        for entry, _ in doubtful:
            entry.settled = True

    def _record_failures(self, failures: list[FailedProblem]) -> None:
        if failures:
            append_failures(self._store.path, failures)
            self._failed.update(failed.id for failed in failures)
            logger.warning(
                f"{len(failures)} problems failed ({failures[-1].reason}); see "
                f"{str(failures_path(self._store.path))!r}"
            )

    def _store_in_order(self, tokens: int) -> None:
        fresh: list[Trace] = []
        while self._queue and self._queue[0].settled and self._total < tokens:
            entry = self._queue.popleft()
            self._total += entry.tokens
            if entry.trace is not None:
                fresh.append(entry.trace)
        self._store.append_many(fresh)

    def _keep_early(self) -> None:
        """Write traces that wait for an earlier one to the second store."""
        early = [entry.trace for entry in self._queue if entry.trace is not None]
        if self._pending is None and early and not self._queue[0].settled:
            self._pending = self._open_pending()
        if self._pending is not None:
            self._pending.append_many([trace for trace in early if trace.id not in self._pending])

    def _open_pending(self) -> TraceStore:
        return TraceStore.open_append(pending_path(self._store.path), self._store.header)

    def _close_pending(self) -> None:
        """Delete the second store if the first one holds all of it."""
        if self._pending is None:
            return
        if all(trace_id in self._store for trace_id in self._pending.ids()):
            self._pending.remove()
        else:
            self._pending.close()
