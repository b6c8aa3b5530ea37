"""Decide how many tokens a store needs: traces for the calibration budget, and held out of it."""

import math
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Self

from loguru import logger
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rac_modifier.calibration.mixture import CalibrationSequence
from rac_modifier.errors import RacError
from rac_modifier.problems.source import load_problems
from rac_modifier.sampling.generate import render_question
from rac_modifier.sampling.model_identity import ModelIdentity
from rac_modifier.settings.calibration import (
    CalibrationSettings,
    Part,
    SelectSettings,
    TraceSettings,
    part_tokens,
)
from rac_modifier.settings.sampling import SamplingSettings
from rac_modifier.traces.collect import collect_traces, used_up
from rac_modifier.traces.records import Trace
from rac_modifier.traces.selection import Judge, Selection
from rac_modifier.traces.store import TraceStore

_HELD_OUT_PROMPTS = 4  # at least, so that an unusual trace does not decide the result
_LEAST_SHARE = 0.02  # of the sampled tokens; a selection that keeps less takes too long
_ENOUGH_TO_JUDGE = 256  # traces after which the share that a selection keeps is known
_FIRST = 256  # problems of each part
_GROWTH = 4.0  # largest growth of the judged traces between two checks


def _hold_out(traces: Iterable[Trace], tokens: int, held: list[Trace]) -> Iterator[Trace]:
    """Yield traces without the first prompts: four or more, with all samples, go to `held`.

    These have at least `tokens` tokens; 0 tokens hold out nothing.
    """
    prompts: set[tuple[int, ...]] = set()
    count = 0
    for trace in traces:
        enough = count >= tokens and (len(prompts) >= _HELD_OUT_PROMPTS or not tokens)
        if enough and trace.prompt_ids not in prompts:
            yield trace
            continue
        prompts.add(trace.prompt_ids)
        held.append(trace)
        count += trace.tokens


class TracePool:
    """The traces that a selection keeps of a store: their `lengths` by id, not their tokens.

    `held_out` are the first traces of the store, `reserved` the next ones, for recovery, which
    cuts their repeating tails itself.
    """

    def __init__(
        self,
        store: TraceStore,
        settings: SelectSettings,
        judge: Judge,
        calibration: CalibrationSettings,
        held_out_tokens: int = 0,
        reserved_tokens: int = 0,
    ):
        self.store, self._calibration = store, calibration
        self.selection = Selection(settings)
        held_out: list[Trace] = []
        reserved: list[Trace] = []
        self.repeated_tokens = store.counts.tokens
        others = _hold_out(self._without_repeats(), held_out_tokens, held_out)
        candidates = _hold_out(others, reserved_tokens, reserved)
        self.lengths = {t.id: t.tokens for t in self.selection.keep(candidates, judge)}
        self.held_out = tuple(held_out)
        self.kept_out_tokens = sum(trace.tokens for trace in (*held_out, *reserved))
        names = {trace.id for trace in reserved}
        self.reserved = tuple(trace for trace in store if trace.id in names) if names else ()

    def _without_repeats(self) -> Iterator[Trace]:
        for trace in (t.without_repeats() for t in self.store):
            self.repeated_tokens -= trace.tokens
            yield trace

    def usable_tokens(self) -> int:
        """Count the tokens of all selected traces, each cut to `max_sequence_tokens`."""
        return sum(map(self._cut_length, self.lengths.values()))

    def draw(self, part: str, tokens: int) -> list[CalibrationSequence]:
        """Draw traces of `tokens` tokens over the whole pool, or all; only these are in memory.

        The order depends on the seed and on the name of the part alone.
        """
        rng = random.Random(f"{self._calibration.seed}/{part}")
        drawn: dict[str, CalibrationSequence | None] = {}
        for name in rng.sample(list(self.lengths), len(self.lengths)):
            if tokens <= 0:
                break
            drawn[name] = None
            tokens -= self._cut_length(self.lengths[name])
        for trace in self.store:
            if trace.id in drawn:
                sequence = trace.without_repeats().sequence
                finished = trace.finish_reason == "stop"
                drawn[trace.id] = CalibrationSequence(*sequence, "traces", finished)
        return [sequence for sequence in drawn.values() if sequence is not None]

    def _cut_length(self, length: int) -> int:
        return min(length, self._calibration.max_sequence_tokens or length)


@dataclass(frozen=True)
class _Goal:
    """What a part of the mixture needs of its traces, in tokens."""

    part: Part
    settings: TraceSettings
    budget: int  # to calibrate on
    held_out: int
    reserved: int  # for recovery

    @property
    def tokens(self) -> int:
        """Return how many tokens a store must hold at least."""
        return self.budget + self.held_out + self.reserved

    @classmethod
    def all(
        cls, traces: TraceSettings, calibration: CalibrationSettings, reserved_tokens: int
    ) -> list[Self]:
        """Return the goal of each part of traces (RacError: an unknown name, or no part)."""
        parts = [(part, traces.named(part.name)) for part in calibration.parts("traces")]
        if not parts:
            raise RacError(
                f"the mixture {calibration.mixture} gives traces no share: nothing to collect"
            )
        budgets, goals = part_tokens(calibration.mixture, calibration.tokens), []
        for part, settings in parts:
            # Divergence is measured on the dense model's traces: nothing is held out of another's.
            off_policy = part.name is not None and settings.allow_off_policy
            share = calibration.mixture[part.key] / calibration.share("traces")
            held_out = math.ceil((0 if off_policy else calibration.held_out_tokens) * share)
            reserved = math.ceil(reserved_tokens * share)
            goals.append(cls(part, settings, budgets[part.key], held_out, reserved))
        return goals


def first_questions(
    traces: TraceSettings, calibration: CalibrationSettings
) -> Iterator[tuple[str, SamplingSettings]]:
    """Yield the first questions of each part of traces, with how they are asked."""
    for goal in _Goal.all(traces, calibration, 0):
        sampling = goal.settings.sampling
        for problem in islice(load_problems(goal.settings.problems, sampling.seed), _FIRST):
            yield problem.question, sampling


def describe_need(
    tokenizer: PreTrainedTokenizerBase,
    traces: TraceSettings,
    calibration: CalibrationSettings,
    reserved_tokens: int = 0,
) -> Iterator[str]:
    """Yield what each part of traces needs, and the most that its problems can give."""
    for goal in _Goal.all(traces, calibration, reserved_tokens):
        sampling, most, asked = goal.settings.sampling, 0, 0
        for problem in load_problems(goal.settings.problems, sampling.seed):
            prompt = len(render_question(tokenizer, problem.question, sampling))
            if prompt <= (goal.settings.problems.max_prompt_tokens or prompt):
                most += sampling.samples_per_problem * (prompt + sampling.max_new_tokens)
            asked += 1
            if most >= 2 * goal.tokens:
                break
        need = (
            f"{goal.part.key}: {goal.tokens:,} tokens of traces are needed ({goal.budget:,} to "
            f"calibrate on, {goal.held_out:,} held out, {goal.reserved:,} for recovery)"
        )
        if most >= 2 * goal.tokens:
            yield f"{need}; {asked:,} problems give twice as many if every completion is cut"
        else:
            few = "too few: " if most < goal.tokens else ""
            yield f"{need}; {few}all {asked:,} problems give at most {most:,}, repetitions included"


def collect_for_calibration(
    model: PreTrainedModel | ModelIdentity,
    tokenizer: PreTrainedTokenizerBase,
    traces: TraceSettings,
    calibration: CalibrationSettings,
    reserved_tokens: int = 0,
) -> dict[str, TracePool]:
    """Fill a store for each part of the mixture that consists of traces; return their pools.

    RacError as `collect_traces`, and for a selection of almost nothing.
    """
    goals = _Goal.all(traces, calibration, reserved_tokens)  # an unknown name is an early error
    for goal in goals:  # a store's columns cannot be changed later
        settings = goal.settings
        problems, correct = settings.problems, settings.select.answers == "correct"
        answered = problems.is_generator or problems.answer_column is not None
        if correct and not answered and not settings.allow_off_policy:
            raise RacError(
                f"{goal.part.key}: traces.select.answers: correct needs reference answers; name "
                f"the column that has them in {problems.source!r} (problems.answer_column), or "
                "select without answers"
            )
    pools: dict[str, TracePool] = {}
    for goal in goals:
        pool = _collect_part(model, tokenizer, goal, calibration)
        if pool.repeated_tokens:
            logger.info(
                f"{goal.part.key}: {pool.repeated_tokens:,} tokens of repeating tails are cut"
            )
        pools[goal.part.key] = pool
    return pools


def _collect_part(
    model: PreTrainedModel | ModelIdentity,
    tokenizer: PreTrainedTokenizerBase,
    goal: _Goal,
    calibration: CalibrationSettings,
) -> TracePool:
    """Sample until the pool holds the budget; a round estimates what the next one needs."""
    key, settings, tokens = goal.part.key, goal.settings, goal.tokens
    judge: Judge | None = None  # the same for all rounds, since it remembers its verdicts
    while True:
        again = tokens > goal.tokens
        store = collect_traces(model, tokenizer, settings, tokens, again=again, may_fall_short=True)
        judge = judge or Judge(tokenizer, store.header)
        select = settings.select
        pool = TracePool(store, select, judge, calibration, goal.held_out, goal.reserved)
        described = pool.selection.describe()
        if pool.selection.kept < pool.selection.total:
            logger.info(f"{key}: {described}")
        if pool.usable_tokens() >= goal.budget:
            return pool
        if store.counts.tokens < tokens:
            left = _left(pool, goal, calibration.mixture)
            raise RacError(f"{used_up(store, settings, tokens)}. {left}")
        share = sum(pool.lengths.values()) / max(store.counts.tokens - pool.kept_out_tokens, 1)
        if pool.selection.total >= _ENOUGH_TO_JUDGE and share < _LEAST_SHARE:
            raise RacError(
                f"{key}: traces.select {described}, {share:.1%} of the tokens sampled: "
                "loosen the selection, or choose other problems"
            )
        kept_out = goal.held_out + goal.reserved
        tokens = max(store.counts.tokens + 1, _store_tokens(pool, goal.budget, kept_out))


def _left(pool: TracePool, goal: _Goal, mixture: Mapping[str, float]) -> str:
    """Describe what is left to calibrate on of problems that are used up, and what would do."""
    usable = pool.usable_tokens()
    parts = [
        f"{pool.kept_out_tokens:,} tokens are held out to measure on or reserved for recovery",
        f"{pool.repeated_tokens:,} repeat themselves and are cut",
        f"{usable:,} of {goal.budget:,} are left to calibrate on",
    ]
    if pool.selection.kept < pool.selection.total:
        parts.insert(2, f"traces.select {pool.selection.describe()}")
    works = int(usable / mixture[goal.part.key]) + 1 - len(mixture)  # parts are rounded
    steps = [f"set calibration.tokens={works}"] if works > 0 else []
    if pool.kept_out_tokens:
        steps.append("lower calibration.held_out_tokens or recover.tokens")
    steps.append("give more problems (a larger limit, another source, more samples_per_problem)")
    return f"For {goal.part.key}, {', '.join(parts)}: {', '.join(steps)}"


def _store_tokens(pool: TracePool, budget: int, kept_out: int) -> int:
    """Estimate the tokens of a store with `budget` usable and `kept_out` kept out."""
    sampled, usable = pool.store.counts.tokens, pool.usable_tokens()
    without_tails = sampled - pool.repeated_tokens
    judged = without_tails - pool.kept_out_tokens
    most = max(judged * _GROWTH, budget)
    pool_tokens = min(judged * budget / usable, most) if usable else most
    return math.ceil((max(pool.kept_out_tokens, kept_out) + pool_tokens) * sampled / without_tails)
