"""Collect traces until the selected ones fill their share of the calibration budget."""

from __future__ import annotations

import contextlib
import math
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

_ENOUGH_TO_JUDGE = 256  # traces, after which the share that a selection keeps is known well enough
_SERVE = (
    "fill the trace store with a server first, which can divide the model over several devices (rac traces collect MODEL "
    "--recipe RECIPE --serve), and start this run again; or name servers in traces.engine"
)
_GROWTH = (
    4.0  # most growth of what a selection judges, from one check to the next, beyond what is wanted
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
    """Fill a store for each part of the mixture that consists of traces; returns what is kept of them, by part.

    Where servers sample (`traces.engine`), a `ModelIdentity` replaces the model, whose weights are then not loaded.

    Raises:
        RacError: see `collect_part`; a mixture that gives traces no share.
    """
    parts = calibration.parts("traces")
    if not parts:
        raise RacError(
            f"the mixture {calibration.mixture} gives traces no share, so there is nothing to collect"
        )
    settings = {
        part: traces.named(part.name) for part in parts
    }  # an unknown name is an error before any sampling
    budgets = part_tokens(calibration.mixture, calibration.tokens)
    return {
        part.key: collect_part(
            model,
            tokenizer,
            part,
            settings[part],
            calibration,
            budgets[part.key],
            progress,
            reserved_tokens,
            processes,
        )
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
    reserved_tokens: int = 0,
    processes: Processes = ALONE,
) -> TracePool:
    """Collect until `wanted` tokens are selected, beside those that are held out or reserved; counted as the traces will be cut.

    Raises:
        RacError: see `collect_traces`; a selection that keeps almost nothing.
    """
    # Divergence is measured on what the dense model wrote, so nothing is held out of a named source of another model.
    held_out = 0 if part.name and traces.allow_off_policy else calibration.held_out_tokens
    share = calibration.mixture[part.key] / calibration.share("traces")
    held_out, reserved = math.ceil(held_out * share), math.ceil(reserved_tokens * share)
    tokens, retry_failed = wanted + held_out + reserved, traces.retry_failed
    judge: Judge | None = None  # one for all rounds, since it remembers its verdicts
    selected = ""  # what the selection kept so far, for the message when the problems end
    while True:
        try:
            samples = _samples_here(model, traces, tokens)
            with (
                on_accelerator(samples, _SERVE) if samples is not None else contextlib.nullcontext()
            ):
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
                    processes=processes,
                )
        except RacError as error:
            raise RacError(f"{error}{selected}") from error
        judge = judge or Judge(tokenizer, store.header)
        pool = TracePool(store, traces.select, judge, tokenizer, calibration, held_out, reserved)
        usable = pool.usable_tokens()
        if pool.selection.kept < pool.selection.total:
            logger.info(f"{part.key}: {pool.selection.describe()}")
            selected = f". For {part.key}, traces.select {pool.selection.describe()}, {usable:,} tokens of {wanted:,}"
        if usable >= wanted:
            if pool.repeated_tokens:
                logger.info(
                    f"{part.key}: {pool.repeated_tokens:,} tokens of tails that repeat are left out"
                )
            return pool
        _check_hopeful(pool, part, traces.select.least_share)
        retry_failed = False  # once per run is enough
        tokens = max(store.counts.tokens + 1, _store_tokens(pool, wanted, held_out + reserved))


def _samples_here(
    model: PreTrainedModel | ModelIdentity, traces: TraceSettings, tokens: int
) -> PreTrainedModel | None:
    """The model, where it has to be on an accelerator because it samples in this process.

    None where servers sample, where the store holds `tokens` already, and without an accelerator.
    """
    if isinstance(model, ModelIdentity) or traces.engine is not None or accelerator() is None:
        return None
    if traces.store is not None:
        path = Path(traces.store)
    else:
        identity = ModelIdentity.of_model(model)
        sampling = traces.sampling.resolved(identity.generation_config)
        path = default_store_path(identity.fingerprint, sampling, traces.problems)
    if read_header(path) is None:
        return model
    return None if TraceStore.read(path).counts.tokens >= tokens else model


def _store_tokens(pool: TracePool, wanted: int, kept_out: int) -> int:
    """How many tokens a store needs, going by what is usable of those that it has: `wanted` beside `kept_out`."""
    sampled, usable = pool.store.counts.tokens, pool.usable_tokens()
    without_tails = sampled - pool.repeated_tokens
    judged = without_tails - pool.kept_out_tokens
    most = max(judged * _GROWTH, wanted)
    others = min(judged * wanted / usable, most) if usable else most
    return math.ceil((max(pool.kept_out_tokens, kept_out) + others) * sampled / without_tails)


def _check_hopeful(pool: TracePool, part: Part, least_share: float) -> None:
    share = sum(pool.lengths) / max(pool.store.counts.tokens - pool.kept_out_tokens, 1)
    if pool.selection.total >= _ENOUGH_TO_JUDGE and share < least_share:
        raise RacError(
            f"{part.key}: traces.select {pool.selection.describe()}, {share:.1%} of the tokens sampled, so the budget takes too "
            f"long: loosen the selection, choose other problems, or lower select.least_share ({least_share:g}) to continue"
        )
