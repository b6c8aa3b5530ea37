"""`rac eval`: models compared by accuracy and thinking, or by divergence from the dense one."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from rac_modifier.cli import options
from rac_modifier.cli.eval_options import EvalOptions
from rac_modifier.cli.models import (
    check_model,
    check_paths,
    engine_of,
    load_on_accelerator,
    own_server,
    resolve,
    subject_of,
)

if TYPE_CHECKING:
    from rac_modifier.evaluation.results import EvalResult
    from rac_modifier.measure.divergence import DivergenceResult
    from rac_modifier.problems.source import Problem
    from rac_modifier.settings.sampling import EngineSettings, SamplingSettings


@options.takes(EvalOptions)
def evaluate(asked: EvalOptions) -> None:
    """Compare models: accuracy with its interval, thinking length, truncated answers, speed.

    All get the same problems and prompts. --divergence checks no answers: it compares predictions.

    Example: rac eval reasoner reasoner-2of4 --problems 300 --cap 512
    """
    from rac_modifier.evaluation.results import check_json_out, check_problems

    to_stdout = asked.json_out == Path("-")
    if asked.json_out is not None and not to_stdout:
        check_json_out(asked.json_out, asked.baseline)
    models = asked.models
    check_paths(models)
    problems = asked.load_problems()
    if asked.stopping:
        problems = [replace(problem, answer=None) for problem in problems]
    elif not asked.divergence:
        check_problems(problems, asked.verifier)
    for name in models:
        check_model(resolve(name))
    if asked.serve:
        from rac_modifier.sampling.own_server import VllmCommand

        VllmCommand.from_environment()
    from rac_modifier.checkpoint.card import add_measured, card_folder
    from rac_modifier.evaluation.calibrated_prompt import choose_prompt, recorded_prompts
    from rac_modifier.runtime.files import write_json_atomic

    carded = models if len(models) == 1 or asked.baseline else models[1:]
    folders = [card_folder(name) for name in carded] if asked.card else []
    prompt, described = choose_prompt(
        {name: recorded_prompts(resolve(name)) for name in models},
        template=asked.template,
        system_prompt=asked.system_prompt,
        thinking=asked.thinking,
    )
    measure = _divergence if asked.divergence else _accuracy
    measured, lines = measure(asked, problems, asked.sampling(prompt))
    content = {"prompt": prompt.model_dump(), **measured}
    described += asked.describe_preset()
    if to_stdout:
        options.print_json(content)
    else:
        counted = [] if models else ["Tokens are the counts of the servers."]
        typer.echo("\n".join([*lines, *counted, *described]))
        if asked.json_out is not None:
            write_json_atomic(asked.json_out, content)
    if asked.card:
        for folder in folders:
            add_measured(folder, [*lines, *described], content)
        typer.echo(f"written into the model card of {', '.join(carded)}", err=to_stdout)


def _divergence(
    asked: EvalOptions, problems: list[Problem], sampling: SamplingSettings
) -> tuple[dict[str, Any], list[str]]:
    """Compare the other models with the first, on samples of the first: values and a table."""
    from rac_modifier.evaluation.tables import divergence_table

    compared = _divergences(asked, problems, sampling)
    values = {"divergence": list(map(asdict, compared))}
    return values, [options.render_results(divergence_table(compared))]


def _divergences(
    asked: EvalOptions, problems: list[Problem], sampling: SamplingSettings
) -> list[DivergenceResult]:
    from rac_modifier.measure.divergence import DenseReference
    from rac_modifier.sampling.generate import sample_sequences

    first, *compressed = asked.models
    with options.resumable("nothing is kept; run the same command again"):
        dense, tokenizer = load_on_accelerator(first, asked.precision)
        sequences = sample_sequences(dense, tokenizer, problems, sampling)
        reference = DenseReference(dense, sequences)
        del dense  # models are in memory one after the other
        return [
            reference.divergence(load_on_accelerator(name, asked.precision)[0], label=name)
            for name in compressed
        ]


def _accuracy(
    asked: EvalOptions, problems: list[Problem], sampling: SamplingSettings
) -> tuple[dict[str, Any], list[str]]:
    """Ask the models: values, and tables with lines on loops, differences and token inflation."""
    from rac_modifier.evaluation.results import PairedDifference, read_results
    from rac_modifier.evaluation.stopping import describe_loops
    from rac_modifier.evaluation.tables import accuracy_table, stopping_table

    baseline = [] if asked.baseline is None else read_results(asked.baseline, sampling)
    answered = _ask(asked, problems, sampling)
    first, *others = [*baseline[:1], *answered]
    pairs = [PairedDifference.of(first, result) for result in others]
    values = {
        "results": [result.model_dump() for result in answered],
        "protocol": asked.record(sampling),
        "stopping": [result.stopping() for result in answered],
    }
    if pairs:
        values["paired"] = list(map(asdict, pairs))
    return values, [
        options.render_results(accuracy_table(answered)),
        options.render_results(stopping_table(answered)),
        *(line for r in answered for line in describe_loops(r.label, r.endings)),
        *(f"{text}." for pair in pairs if (text := pair.describe())),
        *(f"{pair.inflation.describe(pair.first, pair.second)}." for pair in pairs),
        *(f"{text}." for pair in pairs if (text := pair.describe_truncated())),
    ]


def _ask(
    asked: EvalOptions, problems: Sequence[Problem], sampling: SamplingSettings
) -> list[EvalResult]:
    """Evaluate the models, or without models the servers."""
    with options.resumable("the answers so far are kept; run the same command again to go on"):
        if asked.models:
            return [_ask_model(name, asked, problems, sampling) for name in asked.models]
        return _ask_servers(asked, problems, sampling)


def _ask_model(
    name: str, asked: EvalOptions, problems: Sequence[Problem], sampling: SamplingSettings
) -> EvalResult:
    from rac_modifier.evaluation.accuracy import evaluate

    engine: AbstractContextManager[EngineSettings | None] = nullcontext()
    if asked.serve:
        questions = [(problem.question, sampling) for problem in problems]
        engine = own_server(name, asked.precision, asked.concurrency, questions)
    elif asked.server:
        engine = nullcontext(
            engine_of(asked.server, asked.concurrency, asked.cap, *asked.served_as)
        )
    served = asked.serve or asked.server
    model = subject_of(name) if served else load_on_accelerator(name, asked.precision)
    setup = _setup_of(name, asked) if served else None
    with engine as settings:
        return evaluate(
            *model,
            problems,
            label=name,
            source=asked.problem_source,
            sampling=sampling,
            path=asked.answers,
            engine=settings,
            setup=setup,
            verifier=asked.verifier,
        )


def _setup_of(name: str, asked: EvalOptions) -> str:
    """Return a hash of what decides how servers run the model."""
    from transformers.utils.hub import cached_file

    from rac_modifier.formats.quantization_config import (
        CONFIG_FILE,
        QUANTIZATION_KEY,
        SparsityRecord,
    )
    from rac_modifier.runtime.files import read_json

    if asked.serve:
        variables = [os.environ.get(key, "") for key in ("RAC_VLLM_OPTIONS", "RAC_KERNEL")]
        setup = [asked.precision, *variables]
    else:
        setup = [*sorted(engine_of(asked.server, 1, 1).base_urls), *asked.served_as]
    config = read_json(cached_file(resolve(name), CONFIG_FILE) or "")
    decides = [setup, SparsityRecord.of(config).int8_activations]
    if quantization := config.get(QUANTIZATION_KEY):  # of the key-value cache: no weight has it
        decides.append(quantization)
    return hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:12]


def _ask_servers(
    asked: EvalOptions, problems: Sequence[Problem], sampling: SamplingSettings
) -> list[EvalResult]:
    from rac_modifier.evaluation.chat import evaluate_chat

    names: Sequence[str | None] = asked.served_as or [None] * len(asked.server)
    results = []
    for url, name in zip(asked.server, names, strict=True):
        engine = engine_of((url,), asked.concurrency, asked.cap, name)
        results.append(
            evaluate_chat(
                problems,
                engine=engine,
                sampling=sampling,
                path=asked.answers,
                verifier=asked.verifier,
            )
        )
    if len({result.label for result in results}) == len(results):
        return results
    pairs = zip(results, asked.server, strict=True)
    return [r.model_copy(update={"label": f"{r.label} at {url}"}) for r, url in pairs]
