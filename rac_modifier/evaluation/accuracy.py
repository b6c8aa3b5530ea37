"""Ask a model a list of problems and measure its answers."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from loguru import logger
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rac_modifier.errors import RacError
from rac_modifier.evaluation.results import EvalResult, Row, summarise
from rac_modifier.evaluation.stopping import ending_of
from rac_modifier.problems.answer_checker import check_installed
from rac_modifier.problems.answers import Verifier, is_correct, thinking_length
from rac_modifier.problems.source import Problem
from rac_modifier.sampling.generate import FinishReason, Generation
from rac_modifier.sampling.generate import generate as generate_in_process
from rac_modifier.sampling.model_identity import ModelIdentity
from rac_modifier.sampling.openai_server import engine_for
from rac_modifier.sampling.prompts import render_prompt, render_question
from rac_modifier.settings.check import check_settings
from rac_modifier.settings.problems import ProblemSource
from rac_modifier.settings.sampling import EngineSettings, SamplingSettings
from rac_modifier.traces.fill_store import FillStore
from rac_modifier.traces.records import StoreHeader, settings_path
from rac_modifier.traces.store import TraceStore, forget_failures, read_failures

# At a temperature above 0; the reference evaluation has 0.6 and 0.95 (arXiv 2509.12464).
TOP_P = 0.95


def evaluate(
    model: Any,
    tokenizer: Any,
    problems: Sequence[Problem],
    *,
    label: str,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = TOP_P,
    batch_size: int = 128,
    seed: int = 0,
    progress: bool = True,
    verifiers: Mapping[str, Verifier] | None = None,
    render: Callable[[Any, str], list[int]] = render_prompt,
    generate: Callable[..., list[Generation]] = generate_in_process,
) -> EvalResult:
    """Measure accuracy, thinking length, unfinished share and speed over `problems`.

    Args:
        model: a transformers causal LM, or what `generate` accepts.
        tokenizer: the model's tokenizer.
        problems: each with an answer; ids distinct.
        label: the result's name in tables.
        max_new_tokens: the cap. An answer cut off there is unfinished, and right only if it
            already holds the answer.
        temperature: 0 is greedy, which ignores `top_p` and `seed`.
        top_p: sample among the most likely tokens that hold this share.
        batch_size: prompts per call of `generate`.
        seed: of the sampling.
        progress: show a progress bar.
        verifiers: by task name, a function that compares answers instead of math-verify.
        render: from tokenizer and question to prompt ids; default: the chat template.
        generate: completes a batch, with the signature of `sampling.generate.generate`.

    Raises:
        RacError: no problems, a problem without an answer, an id twice, a setting out of range,
            or math-verify is not installed.
    """
    verifiers = verifiers or {}
    check_problems(problems, verifiers)
    # nothing comes from a model's generation_config: all models sample alike
    values = {"temperature": temperature, "top_p": top_p, "top_k": 0, "seed": seed}
    values |= {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
    settings = check_settings(SamplingSettings, values, "the evaluation")
    prompts = [render(tokenizer, problem.question) for problem in problems]
    # longest first: prompts of like length share a batch, and a batch too large fails early
    order = sorted(range(len(problems)), key=lambda i: len(prompts[i]), reverse=True)
    generations: dict[int, Generation] = {}
    started = time.monotonic()
    with tqdm(total=len(order), desc=label, unit="problem", disable=not progress or None) as bar:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            keys = [problems[i].id for i in batch]
            outputs = generate(model, tokenizer, [prompts[i] for i in batch], settings, keys)
            generations.update(zip(batch, outputs, strict=True))
            bar.update(len(batch))
    seconds = time.monotonic() - started
    rows = [
        row_of(tokenizer, problem, generations[i], verifiers.get(problem.task or ""))
        for i, problem in enumerate(problems)
    ]
    return summarise(
        rows, label=label, seconds=seconds, cap=max_new_tokens, temperature=temperature, seed=seed
    )


def evaluate_into_file(
    model: PreTrainedModel | ModelIdentity,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    *,
    label: str,
    source: ProblemSource,
    sampling: SamplingSettings,
    path: Path | None = None,
    engine: EngineSettings | None = None,
    verifiers: Mapping[str, Verifier] | None = None,
    progress: bool = True,
) -> EvalResult:
    """Measure what `evaluate` does, with each answer kept in a trace store as it finishes.

    A kill loses no answer, and the same call goes on.

    Args:
        model: in memory, or its `ModelIdentity` where servers answer.
        tokenizer: the model's tokenizer.
        problems: each with an answer; ids distinct.
        label: the result's name in tables.
        source: where the problems come from, for the header of the file.
        sampling: temperature, cap, seed, answers per problem (`samples_per_problem`). Nothing
            comes from the model's generation_config.
        path: a .jsonl file; default: `default_path`.
        engine: servers; None is the model in this process.
        verifiers: by task name, a function that compares answers instead of math-verify.
        progress: show a bar.

    Raises:
        RacError: problems that cannot be graded; a file of another model or other settings, or
            in use; servers that cannot be reached, hold another model, or left problems without
            an answer. Answers so far are kept.
    """
    check_problems(problems, verifiers or {})
    identity = model if isinstance(model, ModelIdentity) else ModelIdentity.of_model(model)
    in_memory = None if isinstance(model, ModelIdentity) else model
    header = StoreHeader.of(identity, tokenizer, sampling, source)
    path = path or default_path(identity, sampling, source)
    started = time.monotonic()
    with contextlib.closing(
        engine_for(engine, identity, in_memory, tokenizer, sampling, evaluates=True)
    ) as chosen:
        if not path.exists():
            header = header.model_copy(update={"engine": chosen.connect()})
        with TraceStore.open_append(path, header) as store:
            before = store.counts.completion_tokens
            if len(store):
                logger.info(f"{path} holds {len(store)} answers already: going on from there")
            forget_failures(path)
            FillStore(
                store,
                chosen,
                iter(problems),
                lambda problem: render_question(tokenizer, problem.question, sampling),
            ).run(None, progress)
    seconds = time.monotonic() - started
    rows = _stored_rows(store, tokenizer, problems, sampling.samples_per_problem, verifiers or {})
    return summarise(
        rows,
        label=label,
        seconds=seconds,
        cap=sampling.max_new_tokens,
        temperature=sampling.temperature or 0.0,
        seed=sampling.seed,
        generated=store.counts.completion_tokens - before,
    )


def default_path(
    identity: ModelIdentity, sampling: SamplingSettings, source: ProblemSource
) -> Path:
    """Return rac_answers/<fingerprint>-<hash of the settings>.jsonl, a relative path."""
    return settings_path("rac_answers", identity.fingerprint, sampling, source)


def check_problems(problems: Sequence[Problem], verifiers: Mapping[str, Verifier]) -> None:
    """Check that problems can be graded; `verifiers` replace math-verify for their tasks.

    Raises:
        RacError: no problems, a problem without an answer, an id twice, or math-verify is not
            installed.
    """
    if not problems:
        raise RacError(
            "no problems to evaluate on; give at least one (check the problem source and its limit)"
        )
    without = [p.id for p in problems if p.answer is None or not p.answer.strip()]
    if without:
        raise RacError(
            f"{len(without)} of {len(problems)} problems have no answer to check against (first: "
            f"{without[0]!r}); name the column that holds the answers (answer_column), or leave "
            "these problems out"
        )
    seen: set[str] = set()
    for p in problems:
        if p.id in seen:
            raise RacError(f"problem id {p.id!r} appears twice; give each problem once")
        seen.add(p.id)
    if any((p.task or "") not in verifiers for p in problems):
        check_installed("mathematics")


def row_of(
    tokenizer: Any,
    problem: Problem,
    generation: Generation,
    verifier: Verifier | None,
    sample: int = 0,
) -> Row:
    """Check the answer in a completion of token ids, and classify its ending."""
    # The thinking tags of R1 and Qwen3 are ordinary tokens, so they stay in the text.
    text = tokenizer.decode(list(generation.ids), skip_special_tokens=True)
    lengths = len(generation.ids), thinking_length(tokenizer, generation.ids)
    finish, ids = generation.finish_reason, generation.ids
    return row_of_text(problem, text, finish, lengths, verifier, sample, ids)


def row_of_text(
    problem: Problem,
    text: str,
    finish: FinishReason,
    lengths: tuple[int, int],
    verifier: Verifier | None,
    sample: int,
    ids: Sequence[int] = (),
) -> Row:
    """Check an answer and classify its ending; `lengths` are tokens and thinking tokens."""
    assert problem.answer is not None
    correct = is_correct(text, problem.answer, verifier)
    ending = ending_of(
        text,
        problem.answer,
        correct=correct,
        finish=finish,
        tokens=lengths[0],
        thinking_tokens=lengths[1],
        ids=ids,
        question=problem.question,
        verifier=verifier,
    )
    return Row(problem.id, problem.task, correct, text, sample, ending)


def _stored_rows(
    store: TraceStore,
    tokenizer: Any,
    problems: Sequence[Problem],
    samples: int,
    verifiers: Mapping[str, Verifier],
) -> list[Row]:
    """Check the answers of these problems, in their order; the file may hold more."""
    expected = {f"{problem.id}#{i}": (problem, i) for problem in problems for i in range(samples)}
    missing = [name for name in expected if name not in store]
    if missing:
        reasons = {failed.id: failed.reason for failed in read_failures(store.path)}
        raise RacError(
            f"{len(missing)} of {len(expected)} answers are missing (the first: {missing[0]!r}, "
            f"{reasons.get(missing[0], 'not asked')}); answers so far are kept in {store.path}: "
            "run again to ask for the others"
        )
    rows = {}
    for trace in store:
        if trace.id in expected:
            problem, sample = expected[trace.id]
            answer = Generation(trace.completion_ids, trace.finish_reason)
            verifier = verifiers.get(problem.task or "")
            rows[trace.id] = row_of(tokenizer, problem, answer, verifier, sample)
    return [rows[name] for name in expected]
