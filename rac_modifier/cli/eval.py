"""`rac eval`: models compared by accuracy and thinking, or by divergence from the dense one."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from rac_modifier.cli import options
from rac_modifier.cli.answering import Answering
from rac_modifier.cli.models import check_model, load_on_accelerator, resolve
from rac_modifier.cli.protocol import Protocol
from rac_modifier.errors import RacError

if TYPE_CHECKING:
    from rac_modifier.evaluation.results import EvalResult, PairedDifference
    from rac_modifier.measure.divergence import DivergenceResult
    from rac_modifier.problems.source import Problem
    from rac_modifier.settings.sampling import SamplingSettings


def evaluate(
    context: typer.Context,
    models: Annotated[
        list[str] | None,
        typer.Argument(
            help='folders, Hugging Face ids or "reasoner"; the dense one first; none: --server'
        ),
    ] = None,
    problems: Annotated[int, typer.Option(min=1, help="number of problems")] = 300,
    source: options.Source = "arithmetic",
    preset: Annotated[
        Literal["aime24", "aime25", "gpqa-diamond", "gsm8k", "math-500"] | None,
        typer.Option(metavar="NAME", help="aime24, aime25, gpqa-diamond, gsm8k or math-500"),
    ] = None,
    column: options.Column = None,
    answer_column: Annotated[
        str | None, typer.Option(help="column of the answer (file or dataset)")
    ] = None,
    cap: Annotated[int, typer.Option(min=1, help="most new tokens per answer")] = 512,
    temperature: Annotated[
        float | None,
        typer.Option(min=0, help="0: greedy, the default; with --divergence the model's own"),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help="of sampled answers; default 0.95, with --divergence the model's own"),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="answers generated together in this process")
    ] = 128,
    seed: Annotated[int, typer.Option(help="seed of problems and sampling")] = 0,
    system_prompt: Annotated[
        str | None, typer.Option(help='for all models, "" for none; default: as in calibration')
    ] = None,
    template: Annotated[
        Literal["chat", "none"] | None,
        typer.Option(help="chat, or none for the bare question; default: as in calibration"),
    ] = None,
    thinking: Annotated[
        bool | None,
        typer.Option(
            "--thinking/--no-thinking",
            help="enable_thinking of the chat template; default: as in calibration",
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="answers per problem, for pass@k")] = 1,
    server: Annotated[
        list[str] | None,
        typer.Option(metavar="URL", help="OpenAI-compatible server; without models: one each"),
    ] = None,
    served_as: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="with --server: its name of the model; one for each"),
    ] = None,
    serve: Annotated[
        bool,
        typer.Option("--serve", help="start vllm serve for each model, and stop it at the end"),
    ] = False,
    concurrency: Annotated[
        int, typer.Option(min=1, max=4096, help="answers of a server in progress")
    ] = 64,
    answers: Annotated[
        Path | None, typer.Option(help="file of the answers; default: in rac_answers/")
    ] = None,
    baseline: Annotated[
        Path | None, typer.Option(help="the dense model's --json FILE, to pair accuracies with")
    ] = None,
    precision: options.Precision = "auto",
    divergence: Annotated[
        bool,
        typer.Option("--divergence", help="instead: KL and top-1 agreement with the dense model"),
    ] = False,
    stopping: Annotated[
        bool,
        typer.Option("--stopping", help="instead: how answers end and their lengths, not graded"),
    ] = False,
    card: Annotated[
        bool, typer.Option("--card", help="write the figures into README.md of the models")
    ] = False,
    json_out: Annotated[
        Path | None,
        typer.Option(
            "--json", metavar="FILE", help="write the results to this file too; - prints only JSON"
        ),
    ] = None,
) -> None:
    """Compare models: accuracy with its interval, thinking length, truncated answers, speed.

    All get the same problems and prompts. --divergence checks no answers: it compares predictions.

    Example: rac eval reasoner reasoner-2of4 --problems 300 --cap 512
    """
    from rac_modifier.checkpoint.card import add_measured, card_folder
    from rac_modifier.evaluation.accuracy import check_problems
    from rac_modifier.evaluation.calibrated_prompt import choose_prompt, recorded_prompts
    from rac_modifier.evaluation.results import paired_difference
    from rac_modifier.evaluation.results_file import check_json_out, read_results
    from rac_modifier.evaluation.tables import divergence_table
    from rac_modifier.runtime.files import write_json_atomic

    sources = {name: context.get_parameter_source(name) for name in context.params}
    written = {name for name, source in sources.items() if source and source.name != "DEFAULT"}
    models = models or []
    protocol = Protocol(
        *(source, column, answer_column, problems, samples, cap, temperature, top_p, seed)
    ).with_preset(preset, written)
    servers, names = tuple(server or ()), tuple(served_as or ())
    answering = Answering(servers, names, serve, concurrency, answers, precision)
    answering.check(models, written, divergence=divergence)
    if stopping and (divergence or card):
        raise RacError("--stopping prints its own tables; leave --divergence and --card out")
    if divergence and len(models) < 2:
        raise RacError("--divergence compares models with the first one; name at least two")
    to_stdout = json_out == Path("-")
    if json_out is not None and not to_stdout:
        check_json_out(json_out, baseline)
    carded = models if len(models) == 1 or baseline else models[1:]
    folders = [card_folder(name) for name in carded] if card else []
    for name in models:
        check_model(resolve(name))
    prompt, described = choose_prompt(
        {name: recorded_prompts(resolve(name)) for name in models},
        template=template,
        system_prompt=system_prompt,
        thinking=thinking,
    )
    sampling = protocol.sampling(prompt, batch_size, divergence=divergence)
    paired_with = [] if baseline is None else read_results(baseline, sampling)
    asked = protocol.load()
    if stopping:
        asked = [replace(problem, answer=None) for problem in asked]
    elif not divergence:
        check_problems(asked, protocol.verifier)

    pairs: list[PairedDifference] = []
    content: dict[str, Any] = {"prompt": prompt.model_dump()}
    if divergence:
        compared = _divergences(models, asked, sampling, precision)
        content["divergence"] = list(map(asdict, compared))
        lines = [options.render_results(divergence_table(compared))]
    else:
        how = {"sampling": sampling, "verifier": protocol.verifier}
        answered = answering.run(models, asked, protocol.problem_source, **how)
        content["results"] = [result.model_dump() for result in answered]
        content["protocol"] = protocol.record(sampling)
        content["stopping"] = [result.stopping() for result in answered]
        first, *others = [*paired_with[:1], *answered]
        if pairs := [paired_difference(first, result) for result in others]:
            content["paired"] = list(map(asdict, pairs))
        lines = _accuracy_lines(answered, pairs)
    on_preset = protocol.describe()
    if to_stdout:
        options.print_json(content)
    else:
        counted = [] if models else ["Tokens are the counts of the servers."]
        typer.echo("\n".join([*lines, *counted, *described, *on_preset]))
        if json_out is not None:
            write_json_atomic(json_out, content)
    if card:
        for folder in folders:
            add_measured(folder, [*lines, *described, *on_preset], content)
        typer.echo(f"written into the model card of {', '.join(carded)}", err=to_stdout)


def _divergences(
    models: list[str], problems: list[Problem], sampling: SamplingSettings, precision: options.Dtype
) -> list[DivergenceResult]:
    """Compare the other models with the first, on samples of the first."""
    from rac_modifier.measure.divergence import DenseReference
    from rac_modifier.sampling.generate import sample_sequences

    first, *compressed = models
    with options.resumable("nothing is kept; run the same command again"):
        dense, tokenizer = load_on_accelerator(first, precision)
        sequences = sample_sequences(dense, tokenizer, problems, sampling)
        reference = DenseReference(dense, sequences)
        del dense  # models are in memory one after the other
        return [
            reference.divergence(load_on_accelerator(name, precision)[0], label=name)
            for name in compressed
        ]


def _accuracy_lines(answered: list[EvalResult], pairs: list[PairedDifference]) -> list[str]:
    """Return the tables, and lines on loops, differences and token inflation."""
    from rac_modifier.evaluation.stopping import describe_loops
    from rac_modifier.evaluation.tables import accuracy_table, stopping_table

    return [
        options.render_results(accuracy_table(answered)),
        options.render_results(stopping_table(answered)),
        *(line for r in answered for line in describe_loops(r.label, r.endings)),
        *(f"{text}." for pair in pairs if (text := pair.describe())),
        *(f"{pair.inflation.describe(pair.first, pair.second)}." for pair in pairs),
        *(f"{text}." for pair in pairs if (text := pair.describe_truncated())),
    ]
