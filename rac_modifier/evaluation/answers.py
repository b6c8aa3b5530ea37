"""Evaluation with answers kept in a file, of the model in this process or of servers.

The file is a trace store (traces/store.py): answers are appended as they finish, a kill loses none, and the
same command goes on. Its header names model and settings; another model's file is refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from loguru import logger
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rac_modifier.errors import RacError
from rac_modifier.evaluation.accuracy import check_problems, row_of
from rac_modifier.evaluation.results import EvalResult, Row, summarise
from rac_modifier.problems.answers import Verifier
from rac_modifier.problems.source import Problem
from rac_modifier.sampling.generate import Generation
from rac_modifier.sampling.model_identity import ModelIdentity
from rac_modifier.sampling.prompts import render_question
from rac_modifier.settings.problems import ProblemSource
from rac_modifier.settings.sampling import EngineSettings, SamplingSettings
from rac_modifier.traces.collect import engine_for, store_header
from rac_modifier.traces.failures import forget_failures, read_failures
from rac_modifier.traces.fill_store import FillStore
from rac_modifier.traces.records import Trace, settings_of_record
from rac_modifier.traces.store import TraceStore


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
    render: Callable[[Problem], list[int]] | None = None,
    progress: bool = True,
) -> EvalResult:
    """Measure accuracy, thinking length, unfinished share and speed; answers are kept in `path`.

    Args:
        model: in memory, or its `ModelIdentity` where servers answer.
        tokenizer: the model's own.
        problems: each with an answer; ids distinct.
        label: the result's name in tables.
        source: where the problems come from, for the header of the file.
        sampling: temperature, cap, seed, answers per problem (`samples_per_problem`). Nothing comes
            from the model's generation_config.
        path: a .jsonl file; default: `default_path`.
        engine: servers; None is the model in this process.
        verifiers: by task name, a function that compares answers instead of math-verify.
        render: from problem to prompt ids; default: by `sampling`.
        progress: show a bar.

    Raises:
        RacError: problems that cannot be graded; a file of another model or other settings, or in use;
            servers that cannot be reached, hold another model, or left problems without an answer.
            Answers so far are kept.
    """
    check_problems(problems, verifiers or {})
    identity = model if isinstance(model, ModelIdentity) else ModelIdentity.of_model(model)
    in_memory = None if isinstance(model, ModelIdentity) else model
    header = store_header(identity, tokenizer, sampling, source)
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
                render or (lambda problem: render_question(tokenizer, problem.question, sampling)),
            ).run(None, progress)
    seconds = time.monotonic() - started
    rows = _rows(store, tokenizer, problems, sampling.samples_per_problem, verifiers or {})
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
    """Return rac_answers/<fingerprint>-<hash of the settings>.jsonl, under the current directory."""
    settings = json.dumps(settings_of_record(sampling, source), sort_keys=True)
    return (
        Path("rac_answers")
        / f"{identity.fingerprint[:12]}-{hashlib.sha256(settings.encode()).hexdigest()[:12]}.jsonl"
    )


def _rows(
    store: TraceStore,
    tokenizer: Any,
    problems: Sequence[Problem],
    samples: int,
    verifiers: Mapping[str, Verifier],
) -> list[Row]:
    """Check the answers of these problems, in their order; the file may hold more."""
    wanted = {f"{problem.id}#{i}": (problem, i) for problem in problems for i in range(samples)}
    missing = [name for name in wanted if name not in store]
    if missing:
        reasons = {failed.id: failed.reason for failed in read_failures(store.path)}
        raise RacError(
            f"{len(missing)} of {len(wanted)} answers are missing (the first: {missing[0]!r}, "
            f"{reasons.get(missing[0], 'not asked')}); answers so far are kept in {store.path}: run "
            "again to ask for the others"
        )

    def checked(trace: Trace) -> Row:
        problem, sample = wanted[trace.id]
        answer = Generation(trace.completion_ids, trace.finish_reason)
        return row_of(
            tokenizer,
            problem,
            answer,
            verifiers.get(problem.task or ""),
            sample,
        )

    chosen = (trace for trace in store if trace.id in wanted)
    rows = {trace.id: checked(trace) for trace in chosen}
    return [rows[name] for name in wanted]
