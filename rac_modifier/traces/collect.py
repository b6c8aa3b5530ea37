"""Collect traces: sample a model's own chains of thought until a token budget is stored."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from loguru import logger
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rac_modifier.errors import RacError
from rac_modifier.traces.fingerprint import model_fingerprint, tokenizer_fingerprint
from rac_modifier.traces.generation import SamplingSettings, generate
from rac_modifier.traces.problems import Problem, ProblemSource, load_problems
from rac_modifier.traces.prompts import render_prompt
from rac_modifier.traces.records import settings_of_record
from rac_modifier.traces.store import StoreHeader, Trace, TraceStore, read_header


@dataclass(frozen=True)
class _Request:
    """One completion to sample."""

    id: str
    problem: Problem


def collect_traces(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    store_path: str | Path | None,
    *,
    problems: ProblemSource,
    sampling: SamplingSettings,
    tokens: int,
    allow_off_policy: bool = False,
    progress: bool = True,
) -> TraceStore:
    """Fill the store at `store_path` (None: `default_store_path`) up to `tokens` prompt and completion tokens.

    Which traces belong is decided in the order of the problems: the shortest run of them that reaches the budget. So a
    seed gives the same set whatever the batch size and however often the run was killed and started again; a store
    that holds enough already is returned as it is, and one that holds more keeps it.

    A store of another model is refused: traces must be the model's own (on-policy). With `allow_off_policy` it is read,
    and never added to.

    Returns:
        The store, closed for writing.

    Raises:
        RacError: bad problems, settings or prompts; a store that belongs to another model or other settings, is in use
            or is corrupt; the problems end before the budget is reached.
    """
    if tokens < 1:
        raise RacError(f"tokens={tokens}: ask for at least one token to calibrate on")
    sampling = sampling.resolved(model.generation_config)
    header = StoreHeader(
        fingerprint=model_fingerprint(model),
        model=model.config.name_or_path or type(model).__name__,
        tokenizer=tokenizer_fingerprint(tokenizer),
        chat_template=_template_hash(tokenizer) if sampling.template == "chat" else None,
        sampling=sampling,
        problems=problems,
    )
    path = Path(store_path) if store_path is not None else default_store_path(header.fingerprint, sampling, problems)
    stored = read_header(path)
    if stored is not None and stored.fingerprint != header.fingerprint:
        if not allow_off_policy:
            raise RacError(_off_policy_message(path, stored, header))
        return _read_off_policy(path, header, tokens)
    requests = _requests(load_problems(problems, sampling.seed), sampling.samples_per_problem)
    with TraceStore.open_append(path, header) as store:
        if len(store):
            logger.info(f"trace store {str(path)!r} holds {store.counts.tokens:,} tokens already: going on from there")
        _fill(store, model, tokenizer, requests, sampling, tokens, progress)
    return store


def default_store_path(fingerprint: str, sampling: SamplingSettings, problems: ProblemSource) -> Path:
    """rac_traces/<fingerprint>-<hash of what decides the sampling>.jsonl, under the current directory."""
    settings = json.dumps(settings_of_record(sampling, problems), sort_keys=True)
    return Path("rac_traces") / f"{fingerprint[:12]}-{hashlib.sha256(settings.encode()).hexdigest()[:12]}.jsonl"


def _requests(problems: Iterator[Problem], samples: int) -> Iterator[_Request]:
    for problem in problems:
        for sample in range(samples):
            yield _Request(f"{problem.id}#{sample}", problem)


def _fill(
    store: TraceStore,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Iterator[_Request],
    sampling: SamplingSettings,
    tokens: int,
    progress: bool,
) -> None:
    total = 0
    with tqdm(total=tokens, desc="traces", unit="tok", unit_scale=True, disable=not progress) as bar:
        while total < tokens and (batch := list(islice(requests, sampling.batch_size))):
            sampled: list[Trace] = []
            fresh: list[Trace] = []
            for index, request in enumerate(batch):
                if total >= tokens:
                    break
                if request.id in store:
                    total += store.tokens_of(request.id)
                    continue
                # All of the batch, also where part of it is stored: rounding depends on the batch's shape, and a
                # resumed run shall give what an undisturbed one gives.
                sampled = sampled or _sample(model, tokenizer, batch, sampling)
                fresh.append(sampled[index])
                total += sampled[index].tokens
            store.append_many(fresh)
            bar.update(min(total, tokens) - bar.n)
    # A store can hold enough although these problems do not: its traces came under a larger limit.
    held = max(total, store.counts.tokens)
    if held < tokens:
        raise RacError(
            f"the problems of {store.header.problems.source!r} are used up: {held:,} tokens in {len(store)} traces, of "
            f"{tokens:,} asked for (all kept in {str(store.path)!r}). Give more problems (a larger limit, another "
            f"source), sample each more often (samples_per_problem={sampling.samples_per_problem} now; in a new "
            f"store), or ask for tokens={held}"
        )


def _sample(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch: list[_Request], sampling: SamplingSettings
) -> list[Trace]:
    prompts = [
        render_prompt(tokenizer, request.problem.question, sampling.system_prompt, sampling.template)
        for request in batch
    ]
    completions = generate(model, tokenizer, prompts, sampling, [request.id for request in batch])
    return [
        Trace(
            id=request.id,
            problem_id=request.problem.id,
            prompt_ids=tuple(prompt),
            completion_ids=completion.ids,
            finish_reason=completion.finish_reason,
            seed=sampling.seed,
            question=request.problem.question,
            answer=request.problem.answer,
        )
        for request, prompt, completion in zip(batch, prompts, completions, strict=True)
    ]


def _read_off_policy(path: Path, header: StoreHeader, tokens: int) -> TraceStore:
    store = TraceStore.read(path)
    if store.header.tokenizer != header.tokenizer:
        raise RacError(
            f"trace store {str(path)!r} was made with another tokenizer (model {store.header.model!r}): its ids mean "
            "other text to this model; collect this model's own traces"
        )
    if store.counts.tokens < tokens:
        raise RacError(
            f"trace store {str(path)!r} of {store.header.model!r} holds {store.counts.tokens:,} tokens, {tokens:,} "
            "asked for; another model's store is never added to: ask for fewer tokens, or collect more with that model"
        )
    logger.warning(f"calibrating off-policy: the traces in {str(path)!r} are those of {store.header.model!r}")
    return store


def _off_policy_message(path: Path, stored: StoreHeader, header: StoreHeader) -> str:
    return (
        f"trace store {str(path)!r} holds traces of another model ({stored.model!r}, fingerprint "
        f"{stored.fingerprint[:12]}), not of {header.model!r} ({header.fingerprint[:12]}). A model is best calibrated "
        "on its own traces: the paper's R1-Qwen-7B at 50 % sparsity scores .900 on its own, .876 on a bigger model's. "
        "Name another path to collect them, or set allow_off_policy=True to use this store as it is"
    )


def _template_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    return hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()[:12]
