"""Fill a store: which problems to ask next, and the order in which their traces are stored.

The store holds the traces in the order of their problems. A trace that is finished before an
earlier one goes to a second store (`x.pending.jsonl`), so that a kill does not lose it.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from loguru import logger
from transformers import PreTrainedTokenizerBase

from rac_modifier.errors import RacError
from rac_modifier.problems.source import Problem
from rac_modifier.runtime.progress import Phase
from rac_modifier.sampling.engine import Completions, Failure, Prompt
from rac_modifier.sampling.generate import render_question
from rac_modifier.sampling.openai_server import Engine
from rac_modifier.traces.records import Trace
from rac_modifier.traces.store import FailedProblem, TraceStore

_FAILURES_OF_AN_OUTAGE = 16  # without a success between them; fewer are bad problems


@dataclass
class _Sample:
    """A sample of a problem on its way into the store; `tokens` is 0 until they are known."""

    id: str
    problem: Problem
    tokens: int = 0
    settled: bool = False
    trace: Trace | None = None  # finished, but not stored yet
    reason: str = ""  # why it failed


class FillStore:
    """Fills a store, open to append to, from an engine, which is connected when it is needed.

    Problems with prompts of more than `longest` tokens fail.
    """

    def __init__(
        self,
        store: TraceStore,
        engine: Engine,
        problems: Iterator[Problem],
        tokenizer: PreTrainedTokenizerBase,
        longest: int | None = None,
    ):
        self._store, self._engine, self._tokenizer = store, engine, tokenizer
        self._longest = longest
        samples = store.header.sampling.samples_per_problem
        self._samples = (
            (f"{problem.id}#{i}", problem) for problem in problems for i in range(samples)
        )
        self._queue: deque[_Sample] = deque()
        self._asked: dict[str, _Sample] = {}
        self._total = 0  # tokens of the samples that have left the queue
        self._known = 0  # the same, plus the known tokens of samples in the queue
        self.failed = {failed.id for failed in FailedProblem.read(store.path)}
        # Failures since the last success are not written yet: they may be an outage, which must not
        # change the order. They hold up later samples.
        self._doubtful: list[_Sample] = []
        self._pending: TraceStore | None = None
        self._early: dict[str, Trace] = {}
        if TraceStore.pending_path(store.path).exists():
            self._pending = TraceStore.open_append(
                TraceStore.pending_path(store.path), store.header
            )
            self._early = {trace.id: trace for trace in self._pending if trace.id not in store}

    @property
    def early_tokens(self) -> int:
        """Count the completion tokens that a killed run finished and this one has not stored."""
        return sum(len(trace.completion_ids) for trace in self._early.values())

    def run(self, tokens: int | None) -> int:
        """Store the shortest run of problems with `tokens` (None: all); return their tokens."""
        goal, tokens = tokens, 2**62 if tokens is None else tokens
        completions = self._engine.iter_completions(self._batches(tokens))
        try:
            stored = sum(self._store.tokens_by_id.values()) + self.early_tokens
            with Phase("traces", goal, min(stored, tokens), unit="tokens") as phase:
                while self._total < tokens and (batch := next(completions, None)) is not None:
                    self._receive(batch, tokens)
                    phase.advance(steps=max(min(self._total, tokens) - phase.done, 0))
                self._record_doubtful()
                self._store_in_order(tokens)
            return self._total
        finally:
            if self._pending is not None:
                if all(trace_id in self._store for trace_id in self._pending.tokens_by_id):
                    self._pending.path.unlink(missing_ok=True)
                self._pending.close()

    def _batches(self, tokens: int) -> Iterator[list[Prompt]]:
        """Yield prompts while the budget may need more; stored ones are skipped."""
        while self._known < tokens:
            batch = [self._sample(*pair) for pair in islice(self._samples, self._engine.batch_size)]
            if not batch:
                return
            self._queue.extend(batch)
            needed = False
            for sample in batch:
                needed |= not sample.settled and self._known < tokens
                self._known += sample.tokens
            if needed and (prompts := self._prompts(batch)):
                yield prompts
            else:
                self._store_in_order(tokens)

    def _sample(self, trace_id: str, problem: Problem) -> _Sample:
        if trace_id in self._store:
            return _Sample(trace_id, problem, self._store.tokens_by_id[trace_id], settled=True)
        if early := self._early.pop(trace_id, None):
            return _Sample(trace_id, problem, early.tokens, settled=True, trace=early)
        return _Sample(trace_id, problem, settled=trace_id in self.failed)

    def _prompts(self, batch: list[_Sample]) -> list[Prompt]:
        """Return the prompts of a whole batch, stored or not: rounding depends on its shape."""
        self._engine.connect()
        filled, kind = self._store.header.engine.kind, self._engine.kind
        if filled != kind:
            served = filled != "transformers"
            step = "give its servers (traces.engine)" if served else "leave traces.engine out"
            raise RacError(
                f"trace store {str(self._store.path)!r} holds too few tokens, and was filled by "
                f"another engine ({filled}, not {kind}): {step}, or name another path"
            )
        prompts: list[Prompt] = []
        refused: list[_Sample] = []
        for sample in batch:
            sampling = self._store.header.sampling
            ids = render_question(self._tokenizer, sample.problem.question, sampling)
            if self._longest is None or len(ids) <= self._longest:
                prompts.append(Prompt(sample.id, tuple(ids)))
                if not sample.settled:
                    self._asked[sample.id] = sample
            elif not sample.settled:
                sample.reason = f"a prompt of {len(ids)} tokens; the limit is {self._longest}"
                refused.append(sample)
        self._record_failures(refused)
        return prompts

    def _receive(self, completions: Completions, tokens: int) -> None:
        outage: RacError | None = None
        for prompt, outcome in completions:
            if (sample := self._asked.pop(prompt.key, None)) is None:
                continue  # stored before; sampled again for the shape of its batch
            if isinstance(outcome, Failure):
                sample.reason, problem = outcome.reason, "the servers could not complete a prompt"
                if not outcome.of_servers:
                    self._doubtful.append(sample)
                    count = len(self._doubtful)
                    problem = f"{count} completions in a row failed, the last one"
                if outcome.of_servers or len(self._doubtful) >= _FAILURES_OF_AN_OUTAGE:
                    outage = RacError(
                        f"{problem}: {outcome.reason}. Earlier completions are kept in "
                        f"{str(self._store.path)!r}: see to the servers, then run again"
                    )
                continue
            self._record_doubtful()  # a success: earlier failures were bad problems, not an outage
            sample.trace = Trace(
                id=sample.id,
                problem_id=sample.problem.id,
                prompt_ids=prompt.ids,
                completion_ids=outcome.ids,
                finish_reason=outcome.finish_reason,
                seed=self._store.header.sampling.seed,
                question=sample.problem.question,
                answer=sample.problem.answer,
            )
            sample.tokens, sample.settled = sample.trace.tokens, True
            self._known += sample.tokens
        self._store_in_order(tokens)
        self._store_early()
        if outage is not None:
            raise outage

    def _record_doubtful(self) -> None:
        self._record_failures(self._doubtful)
        self._doubtful = []

    def _record_failures(self, samples: list[_Sample]) -> None:
        if not samples:
            return
        failed = [FailedProblem(s.id, s.problem.question, s.reason) for s in samples]
        FailedProblem.append(self._store.path, failed)
        self.failed.update(sample.id for sample in samples)
        for sample in samples:
            sample.settled = True
        path = str(FailedProblem.path(self._store.path))
        logger.warning(f"{len(samples)} problems failed ({samples[-1].reason}); see {path!r}")

    def _store_in_order(self, tokens: int) -> None:
        fresh: list[Trace] = []
        while self._queue and self._queue[0].settled and self._total < tokens:
            sample = self._queue.popleft()
            self._total += sample.tokens
            if sample.trace is not None:
                fresh.append(sample.trace)
        self._store.append_many(fresh)

    def _store_early(self) -> None:
        """Write traces that wait for an earlier one to the second store."""
        early = [sample.trace for sample in self._queue if sample.trace is not None]
        if self._pending is None and early and not self._queue[0].settled:
            path = TraceStore.pending_path(self._store.path)
            self._pending = TraceStore.open_append(path, self._store.header)
        if self._pending is not None:
            self._pending.append_many([trace for trace in early if trace.id not in self._pending])
