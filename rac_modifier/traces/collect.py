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
from rac_modifier.settings.traces import TraceSettings
from rac_modifier.traces.fill_store import FillStore
from rac_modifier.traces.records import StoreHeader, read_header
from rac_modifier.traces.store import TraceStore


def collect_traces(
    model: PreTrainedModel | ModelIdentity,
    tokenizer: PreTrainedTokenizerBase,
    settings: TraceSettings,
    tokens: int,
) -> TraceStore:
    """Fill a store up to `tokens` prompt and completion tokens, and return it, closed for writing.

    It holds the traces of the first problems, in order. `model` is in memory, or its
    `ModelIdentity` if servers sample it. RacError for bad problems, settings or prompts; a store of
    another model or other settings, in use or corrupt; servers that do not sample this model.
    """
    if tokens < 1:
        raise RacError(f"tokens={tokens}: ask for at least one token to calibrate on")
    in_memory = None if isinstance(model, ModelIdentity) else model
    identity = model if isinstance(model, ModelIdentity) else ModelIdentity.of_model(model)
    problems, engine = settings.problems, settings.engine
    sampling = settings.sampling.resolved(identity.generation_config)
    header = StoreHeader.of(identity, tokenizer, sampling, problems)
    path = header.path("rac_traces") if settings.store is None else Path(settings.store)
    stored = read_header(path)
    if stored is not None and stored.fingerprint != header.fingerprint:
        return _read_off_policy(path, stored, header, tokens, settings.allow_off_policy)
    if stored is not None and in_memory is not None and (engine is None or engine.verify_model):
        filler = f"the server that filled trace store {str(path)!r}"
        check_probes(in_memory, stored.engine.probes, filler)
    questions = load_problems(problems, sampling.seed)
    limits = [problems.max_prompt_tokens, identity.context and identity.context - 1]
    longest = min((limit for limit in limits if limit is not None), default=None)
    with contextlib.closing(
        engine_for(engine, identity, in_memory, tokenizer, sampling)
    ) as sampler:
        if stored is None:
            header = header.model_copy(update={"engine": sampler.connect()})
        with TraceStore.open_append(path, header) as store:
            if len(store):
                logger.info(
                    f"trace store {str(path)!r} holds {store.counts.tokens:,} tokens already"
                )
            filling = FillStore(store, sampler, questions, tokenizer, longest)
            total = filling.run(tokens)
    # A store that was filled with a larger limit can hold enough although these problems do not.
    held = max(total, store.counts.tokens)
    if held < tokens:
        again = "remove the .failed.jsonl file to try them again"
        lost = f" {len(filling.failed)} failed: {again}." if filling.failed else ""
        raise RacError(
            f"the problems of {problems.source!r} are used up: {held:,} tokens in {len(store)} "
            f"traces, of {tokens:,} asked for (all kept in {str(path)!r}).{lost} Give more "
            f"problems (a larger limit, another source), ask for tokens={held}, or sample each "
            f"more often in a new store (samples_per_problem={sampling.samples_per_problem} now)"
        )
    return store


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
