"""Collect traces: sample a model's own chains of thought until a token budget is stored."""

import contextlib
from pathlib import Path

from loguru import logger
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rac_modifier.errors import RacError
from rac_modifier.problems.source import load_problems
from rac_modifier.sampling.completions_api import check_probes
from rac_modifier.sampling.model_identity import ModelIdentity
from rac_modifier.sampling.openai_server import engine_for
from rac_modifier.settings.calibration import TraceSettings
from rac_modifier.traces.fill_store import FillStore
from rac_modifier.traces.records import StoreHeader
from rac_modifier.traces.store import FailedProblem, TraceStore


def collect_traces(
    model: PreTrainedModel | ModelIdentity,
    tokenizer: PreTrainedTokenizerBase,
    settings: TraceSettings,
    tokens: int,
    *,
    again: bool = False,
    may_fall_short: bool = False,
) -> TraceStore:
    """Fill a store up to `tokens` prompt and completion tokens, and return it, closed for writing.

    It holds the traces of the first problems, in order. `model` is in memory, or its
    `ModelIdentity` if servers sample it; `again`: this run filled the store before. RacError for
    bad problems, settings or prompts; a store of another model or other settings, in use or
    corrupt; servers that do not sample this model; problems that give too few tokens, unless it
    `may_fall_short`.
    """
    if tokens < 1:
        raise RacError(f"tokens={tokens}: ask for at least one token to calibrate on")
    in_memory = None if isinstance(model, ModelIdentity) else model
    identity = model if isinstance(model, ModelIdentity) else ModelIdentity.of_model(model)
    problems, engine = settings.problems, settings.engine
    sampling = settings.sampling.resolved(identity.generation_config)
    header = StoreHeader.of(identity, tokenizer, sampling, problems)
    path = header.path("rac_traces") if settings.store is None else Path(settings.store)
    stored = StoreHeader.read(path)
    if stored is not None and stored.fingerprint != header.fingerprint:
        store = _read_off_policy(path, stored, header, tokens, settings.allow_off_policy)
        _check_ids(store, identity)
        return store
    if stored is not None and in_memory is not None and (engine is None or engine.verify_model):
        filler = f"the server that filled trace store {str(path)!r}"
        check_probes(in_memory, stored.engine.probes, filler)
    questions = load_problems(problems, sampling.seed)
    limits = [problems.max_prompt_tokens, identity.context and identity.context - 1]
    longest = min((limit for limit in limits if limit is not None), default=None)
    if identity.context is not None and sampling.max_new_tokens >= identity.context and not again:
        logger.warning(
            f"max_new_tokens={sampling.max_new_tokens:,} is more than the model's context of "
            f"{identity.context:,} tokens, at which every completion ends"
        )
    with contextlib.closing(
        engine_for(engine, identity, in_memory, tokenizer, sampling)
    ) as sampler:
        if stored is None:
            header = header.model_copy(update={"engine": sampler.connect()})
        with TraceStore.open_append(path, header) as store:
            _check_ids(store, identity)
            if len(store) and not again:
                logger.info(
                    f"trace store {str(path)!r} holds {store.counts.tokens:,} tokens already"
                )
            total = FillStore(store, sampler, questions, tokenizer, longest).run(tokens)
    # A store that was filled with a larger limit can hold enough although these problems do not.
    held = max(total, store.counts.tokens)
    if held < tokens and not may_fall_short:
        raise RacError(
            f"{used_up(store, settings, tokens)}. Give more problems (a larger limit, another "
            f"source), ask for tokens={held}, or sample each more often in a new store "
            f"(samples_per_problem={sampling.samples_per_problem} now)"
        )
    return store


def used_up(store: TraceStore, settings: TraceSettings, tokens: int) -> str:
    """Describe problems that gave less than `tokens`, and which of them failed."""
    failed = len(FailedProblem.read(store.path))
    again = "remove the .failed.jsonl file to try them again"
    return (
        f"the problems of {settings.problems.source!r} are used up: {store.counts.tokens:,} tokens "
        f"in {len(store):,} traces, of {tokens:,} asked for (all kept in {str(store.path)!r})"
        + (f". {failed} failed: {again}" if failed else "")
    )


def _check_ids(store: TraceStore, identity: ModelIdentity) -> None:
    if store.largest_id >= identity.vocab_size:
        raise RacError(
            f"trace store {str(store.path)!r} holds token id {store.largest_id}, beyond the "
            f"vocabulary of {identity.vocab_size} of {identity.name!r}; it was changed, or is "
            "another model's: name another path"
        )


def _read_off_policy(
    path: Path, stored: StoreHeader, header: StoreHeader, tokens: int, allowed: bool
) -> TraceStore:
    name = f"trace store {str(path)!r}"
    if not allowed:
        raise RacError(
            f"{name} holds traces of another model ({stored.model!r}, fingerprint "
            f"{stored.fingerprint[:12]}), not of {header.model!r} ({header.fingerprint[:12]}): "
            "name another path to collect its own, on which it is best calibrated. In a recipe, "
            "traces.allow_off_policy: true uses this store as it is"
        )
    if stored.tokenizer != header.tokenizer:
        raise RacError(
            f"{name} was made with another tokenizer (model {stored.model!r}): its ids "
            "mean other text to this model; collect this model's own traces"
        )
    store = TraceStore.read(path)
    if store.counts.tokens < tokens:
        raise RacError(
            f"{name} of {stored.model!r} holds {store.counts.tokens:,} tokens, {tokens:,} asked "
            "for: ask for fewer tokens, or collect more with that model"
        )
    logger.warning(f"calibrating off-policy: {name} holds traces of {stored.model!r}")
    return store
