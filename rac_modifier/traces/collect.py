"""Collect traces: sample a model's own chains of thought until a token budget is stored."""

from __future__ import annotations

import contextlib
import hashlib
import json
from functools import partial
from pathlib import Path

from loguru import logger
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rac_modifier.errors import RacError
from rac_modifier.problems.source import load_problems
from rac_modifier.processes import ALONE, Processes
from rac_modifier.sampling.engine import Engine
from rac_modifier.sampling.in_process import InProcessEngine
from rac_modifier.sampling.model_identity import ModelIdentity, tokenizer_fingerprint
from rac_modifier.sampling.probes import check_probes
from rac_modifier.sampling.prompts import render_question
from rac_modifier.settings.problems import ProblemSource
from rac_modifier.settings.sampling import EngineSettings, SamplingSettings
from rac_modifier.traces.fill_store import FillStore
from rac_modifier.traces.records import settings_of_record
from rac_modifier.traces.store import StoreHeader, TraceStore, read_header


def collect_traces(
    model: PreTrainedModel | ModelIdentity,
    tokenizer: PreTrainedTokenizerBase,
    store_path: str | Path | None,
    *,
    problems: ProblemSource,
    sampling: SamplingSettings,
    tokens: int,
    engine: EngineSettings | None = None,
    allow_off_policy: bool = False,
    progress: bool = True,
    processes: Processes = ALONE,
) -> TraceStore:
    """Fill the store at `store_path` up to `tokens` prompt and completion tokens.

    It holds the traces of the first problems, in order, up to the one that reaches the budget. So a
    seed gives the same set for any batch size, and after any number of kills. A store that holds
    enough is returned as it is, also if it holds more.

    Traces must be the model's own (on-policy), so a store of another model is refused. With
    `allow_off_policy` it is read, but never appended to.

    Args:
        model: in memory, or its `ModelIdentity` if servers sample it.
        tokenizer: the model's own.
        store_path: a .jsonl file (None: `default_store_path`). Next to it there may be
            x.pending.jsonl (traces finished before an earlier one) and x.failed.jsonl (problems that
            a server could not complete, with the reason; they are skipped until it is removed).
        problems: the questions.
        sampling: how completions are sampled.
        tokens: the budget.
        engine: servers that sample, asked only if the store holds too little; None: this process.
        allow_off_policy: see above.
        progress: show a bar.
        processes: that sample the model in memory together; all but the first run `help_sampling`.

    Returns:
        The store, closed for writing.

    Raises:
        RacError: bad problems, settings or prompts; a store of another model or other settings, in
            use or corrupt; the problems end before the budget is reached; servers that hold another
            model, return no token ids, or cannot be reached.
    """
    if tokens < 1:
        raise RacError(f"tokens={tokens}: ask for at least one token to calibrate on")
    in_memory = None if isinstance(model, ModelIdentity) else model
    identity = model if isinstance(model, ModelIdentity) else ModelIdentity.of_model(model)
    sampling = sampling.resolved(identity.generation_config)
    header = store_header(identity, tokenizer, sampling, problems)
    path = (
        Path(store_path)
        if store_path is not None
        else default_store_path(header.fingerprint, sampling, problems)
    )
    stored = read_header(path)
    if stored is not None and stored.engine.kind == "openai text":
        raise RacError(
            f"{str(path)!r} holds answers of a server that returns no token ids, and they were "
            "tokenized from their text: they are there to be judged, and no traces; name another path"
        )
    if stored is not None and stored.fingerprint != header.fingerprint:
        if not allow_off_policy:
            raise RacError(_off_policy_message(path, stored, header))
        return _read_off_policy(path, header, tokens)
    if stored is not None and in_memory is not None and (engine is None or engine.verify_model):
        check_probes(
            in_memory, stored.engine.probes, f"the server that filled trace store {str(path)!r}"
        )
    questions = load_problems(problems, sampling.seed)
    with contextlib.closing(
        engine_for(engine, identity, in_memory, tokenizer, sampling, processes)
    ) as chosen:
        if stored is None:
            header = header.model_copy(update={"engine": chosen.connect()})
        with TraceStore.open_append(path, header) as store:
            if len(store):
                logger.info(
                    f"trace store {str(path)!r} holds {store.counts.tokens:,} tokens already: going on from there"
                )
            filling = FillStore(
                store,
                chosen,
                questions,
                lambda problem: render_question(tokenizer, problem.question, sampling),
                partial(_why_too_long, problems.max_prompt_tokens, identity.context),
            )
            _check_enough(filling.run(tokens, progress), store, tokens, filling.failed)
    return store


def store_header(
    identity: ModelIdentity,
    tokenizer: PreTrainedTokenizerBase,
    sampling: SamplingSettings,
    problems: ProblemSource,
) -> StoreHeader:
    """Make the header of a store of this model's traces; `sampling` must be resolved."""
    return StoreHeader(
        fingerprint=identity.fingerprint,
        model=identity.name,
        tokenizer=tokenizer_fingerprint(tokenizer),
        chat_template=_template_hash(tokenizer) if sampling.template == "chat" else None,
        sampling=sampling,
        problems=problems,
    )


def engine_for(
    settings: EngineSettings | None,
    identity: ModelIdentity,
    model: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    sampling: SamplingSettings,
    processes: Processes = ALONE,
    evaluates: bool = False,
) -> Engine:
    """Return an engine on the servers that `settings` name, or without settings on the model in memory.

    With `evaluates`, the completions are answers to be judged; see `ServerEngine`.

    Raises:
        RacError: neither servers nor a model in memory.
    """
    if settings is not None:
        from rac_modifier.sampling.openai_server import ServerEngine

        return ServerEngine(settings, identity, tokenizer, sampling, model, evaluates)
    if model is None:
        raise RacError(
            "the model's weights are not in memory: load it, or name servers that sample it"
        )
    return InProcessEngine(model, tokenizer, sampling, processes)


def _why_too_long(longest: int | None, context: int | None, length: int) -> str | None:
    """Say why a prompt of `length` tokens is not sampled; None: it is."""
    if longest is not None and length > longest:
        return f"a prompt of {length} tokens is longer than problems.max_prompt_tokens={longest}"
    if context is not None and length >= context:
        return f"a prompt of {length} tokens fills the model's context of {context}"
    return None


def default_store_path(
    fingerprint: str, sampling: SamplingSettings, problems: ProblemSource
) -> Path:
    """Return rac_traces/<fingerprint>-<hash of the sampling settings>.jsonl, a relative path."""
    settings = json.dumps(settings_of_record(sampling, problems), sort_keys=True)
    return (
        Path("rac_traces")
        / f"{fingerprint[:12]}-{hashlib.sha256(settings.encode()).hexdigest()[:12]}.jsonl"
    )


def _check_enough(total: int, store: TraceStore, tokens: int, failed: int) -> None:
    # A store that was filled with a larger limit can hold enough although these problems do not.
    held = max(total, store.counts.tokens)
    if held < tokens:
        lost = (
            f" {failed} problems failed: remove the .failed.jsonl file to try them again."
            if failed
            else ""
        )
        raise RacError(
            f"the problems of {store.header.problems.source!r} are used up: {held:,} tokens in "
            f"{len(store)} traces, of {tokens:,} asked for (all kept in {str(store.path)!r}).{lost} "
            "Give more problems (a larger limit, another source), sample each more often "
            f"(samples_per_problem={store.header.sampling.samples_per_problem} now; in a new store), "
            f"or ask for tokens={held}"
        )


def _read_off_policy(path: Path, header: StoreHeader, tokens: int) -> TraceStore:
    store = TraceStore.read(path)
    if store.header.tokenizer != header.tokenizer:
        raise RacError(
            f"trace store {str(path)!r} was made with another tokenizer (model "
            f"{store.header.model!r}): its ids mean other text to this model; collect this model's own "
            "traces"
        )
    if store.counts.tokens < tokens:
        raise RacError(
            f"trace store {str(path)!r} of {store.header.model!r} holds {store.counts.tokens:,} "
            f"tokens, {tokens:,} asked for; another model's store is never appended to: ask for fewer "
            "tokens, or collect more with that model"
        )
    logger.warning(
        f"calibrating off-policy: the traces in {str(path)!r} are those of {store.header.model!r}"
    )
    return store


def _off_policy_message(path: Path, stored: StoreHeader, header: StoreHeader) -> str:
    return (
        f"trace store {str(path)!r} holds traces of another model ({stored.model!r}, fingerprint "
        f"{stored.fingerprint[:12]}), not of {header.model!r} ({header.fingerprint[:12]}). A model is "
        "best calibrated on its own traces: the paper's R1-Qwen-7B at 50 % sparsity scores .900 on its "
        "own, .876 on a bigger model's. Name another path to collect them, or set "
        "allow_off_policy=True to use this store as it is"
    )


def _template_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    return hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()[:12]
