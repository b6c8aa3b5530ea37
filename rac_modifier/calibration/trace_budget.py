"""Collect traces until the selected ones fill their share of the calibration budget."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

from loguru import logger
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rac_modifier.calibration.trace_pool import TracePool
from rac_modifier.errors import RacError
from rac_modifier.model_tools import accelerator, on_accelerator
from rac_modifier.processes import ALONE, Processes
from rac_modifier.sampling.model_identity import ModelIdentity
from rac_modifier.settings.calibration import CalibrationSettings, Part, part_tokens
from rac_modifier.settings.traces import TraceSettings
from rac_modifier.traces.collect import collect_traces, default_store_path
from rac_modifier.traces.grading import Judge
from rac_modifier.traces.store import TraceStore, read_header

_LEAST_SHARE = 0.02  # of the sampled tokens; a selection that keeps less takes too long
_ENOUGH_TO_JUDGE = 256  # traces after which the share that a selection keeps is known
_GROWTH = 4.0  # largest growth of the judged traces between two checks
_SERVE = (
    "fill the trace store with a server first, which can divide the model over several devices "
    "(rac traces collect MODEL --recipe RECIPE --serve), and start this run again; or name servers "
    "in traces.engine"
)


def collect_for_calibration(
    model: PreTrainedModel | ModelIdentity,
    tokenizer: PreTrainedTokenizerBase,
    traces: TraceSettings,
    calibration: CalibrationSettings,
    progress: bool = True,
    reserved_tokens: int = 0,
    processes: Processes = ALONE,
) -> dict[str, TracePool]:
    """Fill a store for each part of the mixture that consists of traces.

    If servers sample (`traces.engine`), a `ModelIdentity` replaces the model, whose weights are then
    not loaded.

    Returns:
        The pool of each part, with tokens for the part's share of the budget next to the traces that
        are held out or reserved.

    Raises:
        RacError: see `collect_traces`; a mixture without traces; a selection that keeps almost nothing.
    """
    parts = calibration.parts("traces")
    if not parts:
        raise RacError(
            f"the mixture {calibration.mixture} gives traces no share, so there is nothing to collect"
        )
    by_part = {part: traces.named(part.name) for part in parts}  # an unknown name is an early error
    budgets = part_tokens(calibration.mixture, calibration.tokens)
    pools: dict[str, TracePool] = {}
    for part, settings in by_part.items():
        # Divergence is measured on traces of the dense model, so nothing is held out of another's.
        off_policy = part.name is not None and settings.allow_off_policy
        share = calibration.mixture[part.key] / calibration.share("traces")
        pools[part.key] = _fill_pool(
            partial(_collect, model, tokenizer, settings, progress, processes),
            part,
            settings,
            calibration,
            tokenizer,
            budgets[part.key],
            math.ceil((0 if off_policy else calibration.held_out_tokens) * share),
            math.ceil(reserved_tokens * share),
        )
    return pools


def _fill_pool(
    collect: Callable[[int], TraceStore],
    part: Part,
    settings: TraceSettings,
    calibration: CalibrationSettings,
    tokenizer: PreTrainedTokenizerBase,
    budget: int,
    held_out: int,
    reserved: int,
) -> TracePool:
    """Collect until `budget` tokens are selected next to the traces that are held out or reserved.

    `collect(tokens)` fills the store up to that many tokens.
    """
    goal = budget + held_out + reserved
    judge: Judge | None = None  # the same for all rounds, since it remembers its verdicts
    selected = ""  # for the message when the problems end
    while True:
        try:
            store = collect(goal)
        except RacError as error:
            raise RacError(f"{error}{selected}") from error
        judge = judge or Judge(tokenizer, store.header)
        pool = TracePool(store, settings.select, judge, tokenizer, calibration, held_out, reserved)
        usable, described = pool.usable_tokens(), pool.selection.describe()
        if pool.selection.kept < pool.selection.total:
            logger.info(f"{part.key}: {described}")
            selected = (
                f". For {part.key}, traces.select {described}, {usable:,} tokens of {budget:,}"
            )
        if usable >= budget:
            if pool.repeated_tokens:
                logger.info(
                    f"{part.key}: {pool.repeated_tokens:,} tokens of tails that repeat are left out"
                )
            return pool
        _check_hopeful(pool, part)
        goal = max(store.counts.tokens + 1, _store_tokens(pool, budget, held_out + reserved))


def _collect(
    model: PreTrainedModel | ModelIdentity,
    tokenizer: PreTrainedTokenizerBase,
    settings: TraceSettings,
    progress: bool,
    processes: Processes,
    tokens: int,
) -> TraceStore:
    with _placed(model, settings, tokens):
        return collect_traces(
            model,
            tokenizer,
            settings.store,
            problems=settings.problems,
            sampling=settings.sampling,
            tokens=tokens,
            engine=settings.engine,
            allow_off_policy=settings.allow_off_policy,
            progress=progress,
            processes=processes,
        )


def _placed(
    model: PreTrainedModel | ModelIdentity, traces: TraceSettings, tokens: int
) -> contextlib.AbstractContextManager[None]:
    """Move the model to an accelerator for sampling.

    It stays where it is if servers sample, if the store holds `tokens` already, and without an
    accelerator.
    """
    if isinstance(model, ModelIdentity) or traces.engine is not None or accelerator() is None:
        return contextlib.nullcontext()
    if traces.store is not None:
        path = Path(traces.store)
    else:
        identity = ModelIdentity.of_model(model)
        sampling = traces.sampling.resolved(identity.generation_config)
        path = default_store_path(identity.fingerprint, sampling, traces.problems)
    if read_header(path) is not None and TraceStore.read(path).counts.tokens >= tokens:
        return contextlib.nullcontext()
    return on_accelerator(model, _SERVE)


def _store_tokens(pool: TracePool, budget: int, kept_out: int) -> int:
    """Estimate the tokens of a store of which `budget` are usable next to `kept_out` tokens."""
    sampled, usable = pool.store.counts.tokens, pool.usable_tokens()
    without_tails = sampled - pool.repeated_tokens
    judged = without_tails - pool.kept_out_tokens
    most = max(judged * _GROWTH, budget)
    others = min(judged * budget / usable, most) if usable else most
    return math.ceil((max(pool.kept_out_tokens, kept_out) + others) * sampled / without_tails)


def _check_hopeful(pool: TracePool, part: Part) -> None:
    share = sum(pool.lengths) / max(pool.store.counts.tokens - pool.kept_out_tokens, 1)
    if pool.selection.total >= _ENOUGH_TO_JUDGE and share < _LEAST_SHARE:
        raise RacError(
            f"{part.key}: traces.select {pool.selection.describe()}, {share:.1%} of the tokens "
            "sampled, so the budget takes too long: loosen the selection, or choose other problems"
        )
