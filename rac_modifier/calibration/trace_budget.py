"""Collect traces until what is calibrated on fills its share of the budget."""

from __future__ import annotations

import contextlib
import math

from loguru import logger
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rac_modifier.calibration.trace_pool import TracePool
from rac_modifier.errors import RacError
from rac_modifier.model_tools import on_accelerator
from rac_modifier.sampling.model_identity import ModelIdentity
from rac_modifier.settings.calibration import CalibrationSettings, Part, part_tokens
from rac_modifier.settings.traces import TraceSettings
from rac_modifier.traces.collect import collect_traces
from rac_modifier.traces.grading import Judge

# So many traces tell what share of them a selection keeps.
_ENOUGH_TO_TELL = 256
_GROWTH = 4.0  # at most, from one look at what is kept to the next


def collect_for_calibration(
    model: PreTrainedModel | ModelIdentity,
    tokenizer: PreTrainedTokenizerBase,
    traces: TraceSettings,
    calibration: CalibrationSettings,
    progress: bool = True,
) -> dict[str, TracePool]:
    """Fill a store for each part of the mixture that is made of traces; returns what is kept of them, by part.

    Where servers sample (`traces.engine`), a `ModelIdentity` stands for the model, whose weights are then not loaded.

    Raises:
        RacError: see `collect_part`; a mixture that gives traces no share.
    """
    parts = calibration.parts("traces")
    if not parts:
        raise RacError(f"the mixture {calibration.mixture} gives traces no share, so there is nothing to collect")
    settings = {part: traces.named(part.name) for part in parts}  # all names are known before the first is sampled
    budgets = part_tokens(calibration.mixture, calibration.tokens)
    return {
        part.key: collect_part(model, tokenizer, part, settings[part], calibration, budgets[part.key], progress)
        for part in parts
    }


def collect_part(
    model: PreTrainedModel | ModelIdentity,
    tokenizer: PreTrainedTokenizerBase,
    part: Part,
    traces: TraceSettings,
    calibration: CalibrationSettings,
    wanted: int,
    progress: bool,
) -> TracePool:
    """Collect until `wanted` tokens can be calibrated on, beside those held out: those that are selected, as they will be cut.

    Raises:
        RacError: see `collect_traces`; a selection that keeps hardly anything.
    """
    # Of a named source only if it is the model's own: divergence is measured on what the dense model wrote.
    held_out = 0 if part.name and traces.allow_off_policy else calibration.held_out_tokens
    held_out = math.ceil(held_out * calibration.mixture[part.key] / calibration.share("traces"))
    tokens, retry_failed, judge = wanted + held_out, traces.retry_failed, None
    kept = ""
    while True:
        with contextlib.nullcontext() if isinstance(model, ModelIdentity) or traces.engine else on_accelerator(model):
            try:
                store = collect_traces(
                    model,
                    tokenizer,
                    traces.store,
                    problems=traces.problems,
                    sampling=traces.sampling,
                    tokens=tokens,
                    engine=traces.engine,
                    retry_failed=retry_failed,
                    allow_off_policy=traces.allow_off_policy,
                    progress=progress,
                )
            except RacError as error:
                raise RacError(f"{error}{kept}") from error
        judge = judge or Judge(tokenizer, store.header)
        pool = TracePool(store, traces.select, judge, tokenizer, calibration, held_out)
        usable = pool.usable_tokens()
        if pool.selection.kept < pool.selection.total:
            logger.info(f"{part.key}: {pool.selection.describe()}")
            kept = f". For {part.key}, traces.select {pool.selection.describe()}, {usable:,} tokens of {wanted:,}"
        if usable >= wanted:
            return pool
        _check_hopeful(pool, part, traces.select.least_share)
        retry_failed = False  # once a run is enough
        others = store.counts.tokens - pool.held_out_tokens
        more = others * min(wanted / usable, _GROWTH) if usable else max(others * _GROWTH, wanted)
        tokens = max(store.counts.tokens + 1, math.ceil(pool.held_out_tokens + more))


def _check_hopeful(pool: TracePool, part: Part, least_share: float) -> None:
    share = sum(pool.lengths) / max(pool.store.counts.tokens - pool.held_out_tokens, 1)
    if pool.selection.total >= _ENOUGH_TO_TELL and share < least_share:
        raise RacError(
            f"{part.key}: traces.select {pool.selection.describe()}, {share:.1%} of the tokens sampled, so the budget takes too "
            f"long: loosen the selection, choose other problems, or lower select.least_share ({least_share:g}) to go on"
        )
