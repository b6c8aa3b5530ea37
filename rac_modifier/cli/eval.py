"""`rac eval`: models compared by accuracy and thinking, or by divergence from the dense one."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from rac_modifier.cli import options
from rac_modifier.cli.answering import ask
from rac_modifier.cli.eval_options import EvalOptions
from rac_modifier.cli.models import check_model, check_paths, load_on_accelerator, resolve

if TYPE_CHECKING:
    from rac_modifier.measure.divergence import DivergenceResult
    from rac_modifier.problems.source import Problem
    from rac_modifier.settings.sampling import SamplingSettings


@options.takes(EvalOptions)
def evaluate(asked: EvalOptions) -> None:
    """Compare models: accuracy with its interval, thinking length, truncated answers, speed.

    All get the same problems and prompts. --divergence checks no answers: it compares predictions.

    Example: rac eval reasoner reasoner-2of4 --problems 300 --cap 512
    """
    from rac_modifier.evaluation.results import check_problems
    from rac_modifier.evaluation.results_file import check_json_out

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
    from rac_modifier.evaluation.results import PairedDifference
    from rac_modifier.evaluation.results_file import read_results
    from rac_modifier.evaluation.stopping import describe_loops
    from rac_modifier.evaluation.tables import accuracy_table, stopping_table

    baseline = [] if asked.baseline is None else read_results(asked.baseline, sampling)
    answered = ask(asked, problems, sampling)
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
