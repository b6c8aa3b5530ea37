"""Ask a model a list of problems and measure its answers, which are kept in a trace store."""

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loguru import logger
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rac_modifier.errors import RacError
from rac_modifier.evaluation.results import EvalResult, check_problems
from rac_modifier.evaluation.stopping import Row, row_of_text
from rac_modifier.problems.answers import Verifier, completion_text, thinking_length
from rac_modifier.problems.source import Problem
from rac_modifier.sampling.generate import Generation, eos_token_ids, render_question
from rac_modifier.sampling.model_identity import ModelIdentity
from rac_modifier.sampling.openai_server import engine_for
from rac_modifier.settings.problems import ProblemSource
from rac_modifier.settings.sampling import EngineSettings, SamplingSettings
from rac_modifier.traces.fill_store import FillStore
from rac_modifier.traces.records import StoreHeader
from rac_modifier.traces.store import FailedProblem, TraceStore

# At a temperature above 0; the reference evaluation has 0.6 and 0.95 (arXiv 2509.12464).
TOP_P = 0.95


def evaluate(
    model: PreTrainedModel | ModelIdentity,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    *,
    label: str,
    source: ProblemSource,
    sampling: SamplingSettings,
    path: Path | None = None,
    engine: EngineSettings | None = None,
    setup: str | None = None,
    verifier: Verifier | None = None,
) -> EvalResult:
    """Measure accuracy, thinking length, endings and speed over `problems`.

    Each answer is appended to a file as it finishes. After a kill, the same call goes on.

    Args:
        model: in memory, or its `ModelIdentity` where servers answer.
        problems: each with an answer, or none with one: then endings and lengths are measured;
            ids distinct.
        source: of the problems, for the header of the file.
        path: a .jsonl file; default: `StoreHeader.path` in rac_answers/.
        engine: servers; None is the model in this process.
        setup: a name for how the servers run the model. It is part of the name of the file.
        verifier: compares answers; default: the scorer of a reasoning-gym task, or math-verify.

    Raises:
        RacError: problems that cannot be graded; a prompt that fills the model's context; a file of
            another model, engine or other settings, or in use; servers that cannot be reached,
            hold another model, or left problems without an answer. Answers so far are kept.
    """
    check_problems(problems, verifier, ungraded=True)
    in_memory = None if isinstance(model, ModelIdentity) else model
    identity = model if isinstance(model, ModelIdentity) else ModelIdentity.of_model(model)
    sampling = sampling.resolved(identity.generation_config)
    _check_lengths(problems, tokenizer, sampling, identity.context)
    header = StoreHeader.of(identity, tokenizer, sampling, source)
    if engine is None and in_memory is not None:
        setup = str(in_memory.dtype).removeprefix("torch.")
    path = path or header.path("rac_answers", setup)
    started = time.monotonic()
    with contextlib.closing(
        engine_for(engine, identity, in_memory, tokenizer, sampling, evaluates=True)
    ) as chosen:
        if StoreHeader.read(path) is None:
            record = chosen.connect().model_copy(update={"setup": setup})
            header = header.model_copy(update={"engine": record})
        with TraceStore.open_append(path, header) as store:
            filled = store.header.engine
            if filled.kind != chosen.kind:
                raise RacError(
                    f"{path} holds answers of {filled.kind}, not of {chosen.kind}; name another "
                    "file"
                )
            if filled.setup not in (None, setup):
                raise RacError(
                    f"{path} holds answers of this model run otherwise (its precision, server, "
                    "quantization, RAC_VLLM_OPTIONS, RAC_KERNEL or 8-bit activations); name "
                    "another file"
                )
            _check_endings(store, set(eos_token_ids(identity, tokenizer)))
            if len(store):
                logger.info(f"{path} holds {len(store)} answers already: going on from there")
            FailedProblem.path(path).unlink(missing_ok=True)
            filling = FillStore(store, chosen, iter(problems), tokenizer)
            before = store.counts.completion_tokens + filling.early_tokens
            filling.run(None)
    seconds = time.monotonic() - started
    return EvalResult.of(
        _stored_rows(store, tokenizer, problems, verifier),
        label=label,
        seconds=seconds,
        sampling=sampling,
        generated=store.counts.completion_tokens + filling.early_tokens - before,
    )


def _check_lengths(
    problems: Sequence[Problem],
    tokenizer: PreTrainedTokenizerBase,
    sampling: SamplingSettings,
    context: int | None,
) -> None:
    """Refuse a problem whose prompt leaves no token of the model's context (RacError)."""
    for problem in problems:
        length = len(render_question(tokenizer, problem.question, sampling))
        if context is not None and length >= context:
            raise RacError(
                f"the prompt of problem {problem.id!r} has {length} tokens and fills the model's "
                f"context of {context}; leave the problem out of its source"
            )


def _check_endings(store: TraceStore, eos: set[int]) -> None:
    """Refuse answers that did not end at the first EOS, since the model had others (RacError)."""
    for trace in store:
        ids, stopped = trace.completion_ids, trace.finish_reason == "stop"
        if not eos.isdisjoint(ids[:-1]) or eos.isdisjoint(ids[-1:]) == stopped:
            raise RacError(
                f"{store.path} holds answers from before the model's EOS tokens were changed (now "
                f"{', '.join(map(str, sorted(eos)))}; the first is {trace.id!r}); remove the file "
                "to ask again, or name another"
            )


def row_of(
    tokenizer: Any,
    problem: Problem,
    prompt_ids: Sequence[int],
    generation: Generation,
    verifier: Verifier | None,
) -> Row:
    """Check the answer in a completion of token ids, and classify its ending."""
    ids = generation.ids
    return row_of_text(
        problem,
        completion_text(tokenizer, ids),
        verifier,
        finish=generation.finish_reason,
        tokens=len(ids),
        thinking_tokens=thinking_length(tokenizer, prompt_ids, ids),
        ids=ids,
    )


def _stored_rows(
    store: TraceStore, tokenizer: Any, problems: Sequence[Problem], verifier: Verifier | None
) -> list[Row]:
    """Check the answers of these problems, in their order; the file may hold more."""
    samples = store.header.sampling.samples_per_problem
    expected = {f"{problem.id}#{i}": problem for problem in problems for i in range(samples)}
    missing = [name for name in expected if name not in store]
    if missing:
        reasons = {failed.id: failed.reason for failed in FailedProblem.read(store.path)}
        raise RacError(
            f"{len(missing)} of {len(expected)} answers are missing (first: {missing[0]!r}, "
            f"{reasons.get(missing[0], 'not asked')}); others are kept in {store.path}: run again"
        )
    rows = {}
    for trace in store:
        if problem := expected.get(trace.id):
            answer = Generation(trace.completion_ids, trace.finish_reason)
            rows[trace.id] = row_of(tokenizer, problem, trace.prompt_ids, answer, verifier)
    return [rows[name] for name in expected]
