"""`rac eval`: models compared by accuracy and thinking, or by divergence from the dense one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from rac_modifier.cli.answering import Answering
from rac_modifier.cli.models import check_model, load_on_accelerator, resolve
from rac_modifier.cli.options import (
    Column,
    Dtype,
    Precision,
    Source,
    print_json,
    render_results,
    resumable,
)
from rac_modifier.cli.protocol import Protocol, written_options
from rac_modifier.errors import RacError

if TYPE_CHECKING:
    from rac_modifier.evaluation.report import ResultTable
    from rac_modifier.evaluation.results import EvalResult, PairedDifference
    from rac_modifier.problems.source import Problem
    from rac_modifier.settings.sampling import PromptSettings


class TemplateName(StrEnum):
    """What `--template` takes."""

    CHAT = "chat"
    NONE = "none"


def evaluate(
    context: typer.Context,
    models: Annotated[
        list[str] | None,
        typer.Argument(
            help='folders, Hugging Face ids or "reasoner"; the dense one first; none: --server'
        ),
    ] = None,
    problems: Annotated[int, typer.Option(min=1, help="number of problems")] = 300,
    source: Source = "arithmetic",
    preset: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="aime24, aime25, gpqa-diamond, gsm8k or math-500"),
    ] = None,
    column: Column = None,
    answer_column: Annotated[
        str | None, typer.Option(help="column of the answer (file or dataset)")
    ] = None,
    cap: Annotated[int, typer.Option(min=1, help="most new tokens per answer")] = 512,
    temperature: Annotated[
        float | None,
        typer.Option(min=0, help="0: greedy, the default; with --divergence the model's own"),
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="0.95 is the default; with --divergence the model's own")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="answers generated together")] = 128,
    seed: Annotated[int, typer.Option(help="seed of problems and sampling")] = 0,
    system_prompt: Annotated[
        str | None, typer.Option(help='for all models, "" for none; default: as in calibration')
    ] = None,
    template: Annotated[
        TemplateName | None,
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
        typer.Option(metavar="NAME", help="the server's name of the model; one per --server"),
    ] = None,
    serve: Annotated[
        bool,
        typer.Option("--serve", help="start vllm serve for each model, and stop it at the end"),
    ] = False,
    concurrency: Annotated[
        int, typer.Option(min=1, help="answers of a server in progress at once")
    ] = 64,
    answers: Annotated[
        Path | None, typer.Option(help="file of the answers, to go on after a kill")
    ] = None,
    baseline: Annotated[
        Path | None, typer.Option(help="the dense model's --json FILE, to be paired with")
    ] = None,
    precision: Precision = Dtype.AUTO,
    divergence: Annotated[
        bool,
        typer.Option("--divergence", help="instead: KL and top-1 agreement with the dense model"),
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="draw the results; .png, .svg or .pdf")] = None,
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
    from rac_modifier.checkpoint.record import card_folder
    from rac_modifier.evaluation.calibrated_prompt import choose_prompt, recorded_prompts
    from rac_modifier.evaluation.report import accuracy_table, plot_bars, plot_file, stopping_table
    from rac_modifier.evaluation.results import paired_difference, read_results
    from rac_modifier.evaluation.stopping import describe_loops, summary
    from rac_modifier.files import write_json_atomic

    models, written = models or [], written_options(context)
    protocol = Protocol(source, column, answer_column, problems, samples, cap, temperature, top_p)
    protocol = protocol.with_preset(preset, written)
    protocol.check(divergence=divergence)
    in_file = Answering(
        tuple(server or ()),
        concurrency,
        protocol.samples,
        answers,
        serve,
        tuple(served_as or ()),
    )
    in_file.check(models, divergence=divergence, temperature=protocol.temperature, written=written)
    _check_options(models, divergence, baseline, json_out)
    paired_with = [] if baseline is None else read_results(baseline)
    if plot is not None:
        plot_file(plot)
    carded = models if len(models) == 1 or paired_with else models[1:]
    folders = [card_folder(name) for name in carded] if card else []
    for name in models:
        check_model(resolve(name))
    choice = choose_prompt(
        {name: recorded_prompts(resolve(name)) for name in models},
        template=None if template is None else template.value,
        system_prompt=system_prompt,
        thinking=thinking,
    )
    run = _Run(models, protocol.load(seed), protocol, choice.prompt, precision, batch_size, seed)
    count = len(run.problems)
    pairs: list[PairedDifference] = []
    loops: list[str] = []
    content: dict[str, Any] = {"prompt": choice.prompt.model_dump()}
    if divergence:
        results, table = run.divergence(plot)
        content["divergence"], tables = results, [table]
    else:
        answered = run.answers_in_file(in_file) if in_file.keeps_answers else run.answers()
        if plot is not None:
            plot_bars(answered, plot)
        content["results"] = results = [result.as_dict() for result in answered]
        content["protocol"] = protocol.record(count)
        content["stopping"] = [summary(result.endings) for result in answered]
        tables = [accuracy_table(answered), stopping_table(answered)]
        loops = [line for r in answered for line in describe_loops(r.label, r.endings)]
        first, *results_after = [*paired_with[:1], *answered]
        pairs = [paired_difference(first, result) for result in results_after]
    if pairs:
        content["paired"] = [pair.as_dict() for pair in pairs]
    to_stdout = json_out == Path("-")
    if to_stdout:
        print_json(content)
    else:
        lines = [
            *(render_results(table) for table in tables),
            *loops,
            *(f"{pair.describe()}." for pair in pairs),
            *(f"{pair.inflation.describe(pair.first, pair.second)}." for pair in pairs),
            *([] if models else ["Tokens are the counts of the servers."]),
            choice.describe(),
            *protocol.describe(count),
        ]
        typer.echo("\n".join(lines))
        if json_out is not None:
            write_json_atomic(json_out, content)
    if card:
        conditions = {
            "source": protocol.source,
            "prompt": choice.prompt.describe(),
            "protocol": protocol.describe(count),
        }
        reference = {"label": models[0]} if divergence else first.as_dict() if pairs else None
        _write_cards(folders, results, pairs, conditions, reference)
        typer.echo(f"written into the model card of {', '.join(carded)}", err=to_stdout)


def _check_options(
    models: list[str], divergence: bool, baseline: Path | None, json_out: Path | None
) -> None:
    """Refuse options that do not go together, and a file that cannot be written (RacError)."""
    if json_out is not None and json_out != Path("-") and not json_out.absolute().parent.is_dir():
        raise RacError(f"--json {json_out}: its folder does not exist; create it first")
    if divergence and len(models) < 2:
        raise RacError(
            "--divergence compares pruned models with the first one; name at least two models"
        )
    if divergence and baseline is not None:
        raise RacError(f"--baseline {baseline} pairs accuracies; leave it out with --divergence")


@dataclass(frozen=True)
class _Run:
    """What all models are protocol, and how."""

    models: list[str]
    problems: list[Problem]
    protocol: Protocol
    prompt: PromptSettings
    precision: Dtype
    batch_size: int
    seed: int

    @property
    def _limits(self) -> dict[str, Any]:
        return {**self.protocol.limits(), "batch_size": self.batch_size, "seed": self.seed}

    def answers_in_file(self, in_file: Answering) -> list[EvalResult]:
        """Return the accuracy of each model or server, its answers kept in a file."""
        how = (self._limits, self.prompt, self.precision, self.protocol.verifiers())
        where = self.protocol.where()
        if not self.models:
            limits, prompt, _, verifiers = how
            return in_file.run_by_name(self.problems, where, limits, prompt, verifiers)
        return [in_file.run(name, self.problems, where, *how) for name in self.models]

    def answers(self) -> list[EvalResult]:
        """Return the accuracy of each model, which answers in this process."""
        from rac_modifier.evaluation.accuracy import evaluate as run
        from rac_modifier.sampling.prompts import render_prompt

        prompt = self.prompt

        def render(tokenizer: Any, question: str) -> list[int]:
            return render_prompt(
                tokenizer, question, prompt.system_prompt, prompt.template, prompt.thinking
            )

        how = {**self._limits, "render": render, "verifiers": self.protocol.verifiers()}
        with resumable(
            "no answer is kept; run the same command again, for one model with --answers FILE to "
            "keep them"
        ):
            return [
                run(*load_on_accelerator(name, self.precision), self.problems, label=name, **how)
                for name in self.models
            ]

    def divergence(self, plot: Path | None) -> tuple[list[dict[str, Any]], ResultTable]:
        """Return KL and top-1 agreement with the first model, on samples of the first."""
        from rac_modifier.evaluation.divergence import divergence
        from rac_modifier.evaluation.report import divergence_table, plot_divergence
        from rac_modifier.evaluation.teacher_forcing import sample_sequences
        from rac_modifier.settings.sampling import SamplingSettings

        sampling = SamplingSettings(
            temperature=self.protocol.temperature,
            top_p=self.protocol.top_p,
            max_new_tokens=self.protocol.cap,
            batch_size=self.batch_size,
            seed=self.seed,
            **self.prompt.model_dump(),
        )
        first, *compressed = self.models
        with resumable("nothing is kept; run the same command again"):
            dense, tokenizer = load_on_accelerator(first, self.precision)
            sequences = sample_sequences(dense, tokenizer, self.problems, sampling)
            results = [
                divergence(
                    dense, load_on_accelerator(name, self.precision)[0], sequences, label=name
                )
                for name in compressed
            ]
        if plot is not None:
            plot_divergence(results, plot)
        return [result.as_dict() for result in results], divergence_table(results)


def _write_cards(
    folders: list[Path],
    results: list[dict[str, Any]],
    pairs: list[PairedDifference],
    conditions: dict[str, Any],
    reference: dict[str, Any] | None,
) -> None:
    """Write the last `results` into the cards of `folders`; the first may be the reference."""
    from rac_modifier.checkpoint.record import add_measured
    from rac_modifier.files import public_name

    shift = len(results) - len(folders)
    for i, folder in enumerate(folders):
        result, paired = results[shift + i], None
        if pairs:
            first, second = (public_name(name) for name in (pairs[i].first, pairs[i].second))
            paired = replace(pairs[i], first=first, second=second).describe()
        kind: Literal["accuracy", "divergence"] = "divergence" if "kl" in result else "accuracy"
        add_measured(
            folder, kind, result, conditions=conditions, reference=reference, paired=paired
        )
