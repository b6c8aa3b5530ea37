"""Filling a store: which problems to ask next, and the order in which their traces are stored.

The store holds the traces in the order of their problems, whatever the order in which an engine finishes them: so it is the
same file for every number of servers and however often the run was killed. A trace that is finished before one that
precedes it waits in a second store beside it (`x.pending.jsonl`), where a kill does not lose it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from loguru import logger
from tqdm import tqdm

from rac_modifier.errors import RacError
from rac_modifier.problems.source import Problem
from rac_modifier.sampling.engine import Engine, Failure, Prompt
from rac_modifier.sampling.generate import Generation
from rac_modifier.traces.failures import FailedProblem, append_failures, failures_path, read_failures
from rac_modifier.traces.store import Trace, TraceStore

# Looking ahead this many times the concurrency keeps servers busy while one long chain of thought holds the others up.
_LOOK_AHEAD = 4
# So many failures without a success between them are an outage, not bad problems.
_FAILURES_OF_AN_OUTAGE = 16


@dataclass(frozen=True)
class Request:
    """One completion to sample."""

    id: str
    problem: Problem


@dataclass
class _Entry:
    """A request on its way; `tokens` is 0 until they are known."""

    request: Request
    tokens: int = 0
    settled: bool = False
    prompt: Prompt | None = None
    future: Future[Generation | Failure] | None = None
    trace: Trace | None = None
    """To be stored yet."""


def pending_path(store: Path) -> Path:
    """traces.jsonl -> traces.pending.jsonl."""
    return store.with_name(f"{store.stem}.pending.jsonl")


class Filling:
    """Fills one store from one engine.

    Args:
        store: open to add to.
        engine: asked for what neither the store nor its side files hold; `connect` is called before the first time.
        requests: in the order of the problems.
        render: the token ids of a problem's prompt.
        refuse: why a prompt of that many tokens is not asked, or None.
    """

    def __init__(
        self,
        store: TraceStore,
        engine: Engine,
        requests: Iterator[Request],
        render: Callable[[Problem], list[int]],
        refuse: Callable[[int], str | None] = lambda length: None,
    ):
        self._store, self._engine, self._requests, self._render = store, engine, requests, render
        self._refuse = refuse
        self._queue: deque[_Entry] = deque()
        self._total = 0  # tokens of the problems that have left the queue
        self._under_way = 0
        self._connected = False
        self._failed = {failed.id for failed in read_failures(store.path)}
        # Since the last success; not written yet. Their entries hold up those behind them: an outage must not change the order.
        self._failures: list[FailedProblem] = []
        self._doubtful: list[_Entry] = []
        self._pending: TraceStore | None = None
        self._early: dict[str, Trace] = {}
        path = pending_path(store.path)
        if engine.concurrency or path.exists():
            self._pending = TraceStore.open_append(path, store.header)
            self._early = {trace.id: trace for trace in self._pending if trace.id not in store}

    def run(self, tokens: int, progress: bool) -> int:
        """Store the shortest run of problems that holds `tokens`; returns what it holds, less if the problems end.

        Raises:
            RacError: no room on the disk, an engine that cannot go on; what is stored by then stays.
        """
        try:
            with tqdm(total=tokens, desc="traces", unit="tok", unit_scale=True, disable=not progress) as bar:
                while self._total < tokens:
                    self._ask_for_more(tokens)
                    if not self._under_way:
                        self._take_note()
                    if not self._queue:
                        break
                    stop = self._receive()
                    self._store_in_order(tokens)
                    self._keep_early()
                    if stop is not None:
                        raise stop
                    bar.update(min(self._total, tokens) - bar.n)
            self._take_note()
            return self._total
        finally:
            self._close_pending()

    @property
    def failed(self) -> int:
        """How many problems failed, in this run and before."""
        return len(self._failed)

    def _ask_for_more(self, tokens: int) -> None:
        """Queue requests, and submit those that are not stored, as long as the budget may need them."""
        known = self._total + sum(entry.tokens for entry in self._queue)
        longest = max(_LOOK_AHEAD * self._engine.concurrency, 1) + len(self._doubtful)
        while known < tokens and len(self._queue) < longest and self._under_way < max(self._engine.concurrency, 1):
            batch = [self._entry(r) for r in islice(self._requests, self._engine.batch_size)]
            if not batch:
                return
            self._queue.extend(batch)
            if self._is_needed(batch, tokens - known):
                self._submit(batch)
            known += sum(entry.tokens for entry in batch)

    def _entry(self, request: Request) -> _Entry:
        if request.id in self._store:
            return _Entry(request, self._store.tokens_of(request.id), settled=True)
        if early := self._early.pop(request.id, None):
            return _Entry(request, early.tokens, settled=True, trace=early)
        return _Entry(request, settled=request.id in self._failed)

    @staticmethod
    def _is_needed(batch: list[_Entry], tokens: int) -> bool:
        for entry in batch:
            if tokens <= 0:
                return False
            if not entry.settled:
                return True
            tokens -= entry.tokens
        return False

    def _submit(self, batch: list[_Entry]) -> None:
        """All of a batch, also where part of it is stored.

        Rounding depends on the shape of a batch, and a resumed run shall give what an undisturbed one gives.
        """
        self._connect()
        refused: list[FailedProblem] = []
        asked: list[_Entry] = []
        for entry in batch:
            request, ids = entry.request, self._render(entry.request.problem)
            if (reason := self._refuse(len(ids))) is None:
                entry.prompt = Prompt(request.id, ids)
                asked.append(entry)
            elif not entry.settled:
                entry.settled = True
                refused.append(FailedProblem(request.id, request.problem.question, reason))
        self._note_failures(refused)
        prompts = [entry.prompt for entry in asked if entry.prompt is not None]
        for entry, future in zip(asked, self._engine.submit(prompts) if prompts else [], strict=True):
            if not entry.settled:
                entry.future = future
                self._under_way += 1

    def _connect(self) -> None:
        if self._connected:
            return
        self._engine.connect()
        filled = self._store.header.engine.kind
        if filled != self._engine.kind:
            way_out = "give its servers (traces.engine)" if filled == "openai" else "leave traces.engine out"
            raise RacError(
                f"trace store {str(self._store.path)!r} holds too few tokens, and was filled by another engine ({filled}, "
                f"not {self._engine.kind}), which draws other samples: {way_out}, or name another path"
            )
        self._connected = True

    def _receive(self) -> RacError | None:
        """Wait until something is finished, unless the first of the queue is, and take over all that is.

        Returns an error to stop with, once what finished beside it is stored.
        """
        futures = [entry.future for entry in self._queue if entry.future is not None]
        if futures and not self._queue[0].settled:
            wait(futures, return_when=FIRST_COMPLETED)
        stop = None
        for entry in self._queue:
            if entry.future is None or not entry.future.done():
                continue
            future, entry.future = entry.future, None
            self._under_way -= 1
            try:
                self._settle(entry, future.result())
            except RacError as error:
                stop = error
        return stop

    def _settle(self, entry: _Entry, outcome: Generation | Failure) -> None:
        request, header = entry.request, self._store.header
        if isinstance(outcome, Failure):
            self._failures.append(FailedProblem(request.id, request.problem.question, outcome.reason))
            if len(self._failures) >= _FAILURES_OF_AN_OUTAGE:
                raise RacError(
                    f"{len(self._failures)} completions in a row failed, the last one: {outcome.reason}. What was finished "
                    f"before is kept in {str(self._store.path)!r}: see to the servers, then run again to go on from there"
                )
            self._doubtful.append(entry)
            return
        self._take_note()
        assert entry.prompt is not None
        entry.trace = Trace(
            id=request.id,
            problem_id=request.problem.id,
            prompt_ids=tuple(entry.prompt.ids),
            completion_ids=outcome.ids,
            finish_reason=outcome.finish_reason,
            seed=header.sampling.seed,
            question=request.problem.question,
            answer=request.problem.answer,
        )
        entry.tokens, entry.settled = entry.trace.tokens, True

    def _take_note(self) -> None:
        """Something was completed, so what failed before were bad problems and no outage."""
        failures, self._failures = self._failures, []
        self._note_failures(failures)
        for entry in self._doubtful:
            entry.settled = True
        self._doubtful.clear()

    def _note_failures(self, failures: list[FailedProblem]) -> None:
        if failures:
            append_failures(self._store.path, failures)
            self._failed.update(failed.id for failed in failures)
            logger.warning(
                f"{len(failures)} problems failed ({failures[-1].reason}); see {str(failures_path(self._store.path))!r}"
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
        """Put what is finished too early where a kill does not lose it."""
        if self._pending is not None:
            traces = [entry.trace for entry in self._queue if entry.trace is not None]
            self._pending.append_many([trace for trace in traces if trace.id not in self._pending])

    def _close_pending(self) -> None:
        """Keep the second store only if it holds what the first one lacks."""
        if self._pending is None:
            return
        if all(trace_id in self._store for trace_id in self._pending.ids()):
            self._pending.remove()
        else:
            self._pending.close()
