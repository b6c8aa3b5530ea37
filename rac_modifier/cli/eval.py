"""`rac eval`: models compared by accuracy and thinking, or by divergence from the dense one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from rac_modifier.cli.models import check_model, load, resolve
from rac_modifier.cli.options import Dtype, Precision
from rac_modifier.errors import RacError


def evaluate(
    models: Annotated[list[str], typer.Argument(help='folders, Hugging Face ids or "reasoner"; the dense one first')],
    problems: Annotated[int, typer.Option(min=1, help="how many problems")] = 300,
    source: Annotated[
        str,
        typer.Option(
            help='"arithmetic" (held out from calibration), reasoning-gym:TASK, a .jsonl, .json or .parquet file, '
            "or a dataset id"
        ),
    ] = "arithmetic",
    column: Annotated[str | None, typer.Option(help="column of the question (file or dataset)")] = None,
    answer_column: Annotated[str | None, typer.Option(help="column of the answer (file or dataset)")] = None,
    cap: Annotated[int, typer.Option(min=1, help="new tokens after which an answer counts as never finished")] = 512,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="0 is greedy; default: greedy, with --divergence the model's own")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="answers generated together")] = 128,
    seed: Annotated[int, typer.Option(help="seed of problems and sampling")] = 0,
    precision: Precision = Dtype.AUTO,
    direct: Annotated[
        bool, typer.Option("--direct", help="close the thinking before it begins: what the model knows without it")
    ] = False,
    divergence: Annotated[
        bool,
        typer.Option("--divergence", help="instead: KL and top-1 agreement with the dense model on its own samples"),
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(help="with --divergence: plot it against the position in the completion, as .png")
    ] = None,
    json_out: Annotated[Path | None, typer.Option("--json", help="write the results to this file too")] = None,
) -> None:
    """Compare models: accuracy with its interval, thinking length, share that never finishes, speed.

    All get the same problems, asked zero-shot through the chat template, and the same cap. With --divergence no answer is
    checked: the first model is sampled, and the others are measured against its predictions, token by token.

    Example: rac eval reasoner reasoner-2of4 --problems 300 --cap 512
    """
    from rac_modifier.evaluation.accuracy import evaluate as run
    from rac_modifier.evaluation.report import render_table
    from rac_modifier.files import write_json_atomic
    from rac_modifier.problems.held_out import held_out_problems
    from rac_modifier.reasoner import direct_answer_prompt
    from rac_modifier.sampling.prompts import render_prompt

    if json_out is not None and not json_out.absolute().parent.is_dir():
        raise RacError(f"--json {json_out}: its folder does not exist; create it first")
    if divergence and len(models) < 2:
        raise RacError("--divergence compares pruned models with the first one; name at least two models")
    if divergence and direct:
        raise RacError("--divergence samples the model with its thinking; give it without --direct")
    if plot is not None and not divergence:
        raise RacError("--plot draws divergence against position; give --divergence too")
    for name in models:
        check_model(resolve(name))
    chosen = held_out_problems(source, problems, seed, column, answer_column)
    if divergence:
        from rac_modifier.settings.sampling import SamplingSettings

        sampling = SamplingSettings(temperature=temperature, max_new_tokens=cap, batch_size=batch_size, seed=seed)
        _divergence(models, chosen, sampling, precision, plot, json_out)
        return
    results = []
    for name in models:
        loaded, tokenizer = load(name, precision)
        results.append(
            run(
                loaded,
                tokenizer,
                chosen,
                label=name,
                render=direct_answer_prompt if direct else render_prompt,
                max_new_tokens=cap,
                temperature=temperature or 0.0,
                batch_size=batch_size,
                seed=seed,
            )
        )
    typer.echo(render_table(results))
    if json_out is not None:
        write_json_atomic(json_out, {"results": [result.as_dict() for result in results]})


def _divergence(
    models: list[str], problems: list[Any], sampling: Any, precision: Dtype, plot: Path | None, json_out: Path | None
) -> None:
    from rac_modifier.evaluation.divergence import divergence
    from rac_modifier.evaluation.own_samples import sample_sequences
    from rac_modifier.evaluation.plot import plot_divergence
    from rac_modifier.evaluation.report import render_divergence_table
    from rac_modifier.files import write_json_atomic

    dense, tokenizer = load(models[0], precision)
    sequences = sample_sequences(dense, tokenizer, problems, sampling)
    results = [divergence(dense, load(name, precision)[0], sequences, label=name) for name in models[1:]]
    typer.echo(render_divergence_table(results))
    if plot is not None:
        plot_divergence(results, plot)
    if json_out is not None:
        write_json_atomic(json_out, {"divergence": [result.as_dict() for result in results]})
