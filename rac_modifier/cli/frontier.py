"""`rac frontier`: a grid of recipes run on one model and measured; `rac report`: its page."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rac_modifier.cli.models import (
    check_model,
    compress,
    load_on_accelerator,
    own_server,
    resolve,
    subject_of,
)
from rac_modifier.cli.options import Dtype, Model, Precision, resumable
from rac_modifier.errors import RacError

if TYPE_CHECKING:
    from rac_modifier.evaluation.results import EvalResult
    from rac_modifier.frontier.measure import HeldOut
    from rac_modifier.frontier.run import Tools
    from rac_modifier.settings.grid import GridEvaluation
    from rac_modifier.settings.sampling import PromptSettings


def frontier(
    model: Model,
    recipe_grid: Annotated[
        str,
        typer.Option(
            "--recipe-grid",
            metavar="GRID",
            help="a YAML file, or a shipped grid: small, paper or contenders",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(help="folder of the results; a folder with finished rows is gone on with"),
    ],
    precision: Precision = "auto",
    remove_models: Annotated[
        bool, typer.Option("--remove-models", help="remove each checkpoint when it is measured")
    ] = False,
    check: Annotated[
        bool,
        typer.Option("--check", help="only check the grid and the disk, list the rows, and exit"),
    ] = False,
) -> None:
    """Run a grid of recipes on a model, and measure each: divergence, accuracy, bytes, speed.

    All rows and the disk are checked before the first starts. A row that is finished is not run
    again. Models are compressed in the dtype that they are stored in; --precision is for
    measuring. rac report draws the results.

    Example: rac frontier reasoner --recipe-grid small --out reasoner-frontier
    """
    from rac_modifier.settings.grid import load_grid, plan_rows, shared_prompt

    grid = load_grid(recipe_grid)
    plan_rows(grid, recipe_grid)
    check_model(resolve(model))
    from rac_modifier.checkpoint.output_folder import check_room
    from rac_modifier.frontier.folder import FrontierFolder
    from rac_modifier.frontier.run import check_finished, run_grid

    # registers the modifiers
    from rac_modifier.llmcompressor.checks import check_recipe, skeleton_of

    skeleton = skeleton_of(resolve(model))
    planned = plan_rows(grid, recipe_grid, lambda recipe: check_recipe(recipe, skeleton))
    prompt = shared_prompt(planned, grid.evaluation, recipe_grid)
    if grid.evaluation.serve:
        from rac_modifier.sampling.own_server import VllmCommand

        VllmCommand.from_environment().check_plugin()
    # dense checkpoints, and one more while a row is packed; what is there already counts
    size = sum(p.numel() * p.element_size() for p in skeleton.parameters())
    written = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    check_room(out, ((1 if remove_models else len(planned)) + 1) * size - written)
    held_out = _held_out_of(grid.evaluation, prompt)
    about = _about(model, grid.evaluation, held_out, precision)
    folder = FrontierFolder(out)
    folder.begin(about, check=True)
    check_finished(folder, planned)
    if check:
        typer.echo("\n".join(f"{run.label}: {run.group}" for run in planned))
        return
    tools = _tools_of(model, grid.evaluation, held_out, out, precision)
    with resumable("finished rows are kept; run the same command again to go on"), folder:
        folder.begin(about)
        run_grid(folder, planned, held_out, tools, remove_models=remove_models)
    typer.echo(f"{len(planned) + 1} rows in {out}; see them with: rac report {out} -o report.html")


def _held_out_of(evaluation: GridEvaluation, prompt: PromptSettings) -> HeldOut:
    """Return the problems that all rows answer (RacError: some or, if served, all lack answers)."""
    from rac_modifier.evaluation.accuracy import TOP_P
    from rac_modifier.evaluation.results import check_problems
    from rac_modifier.frontier.measure import HeldOut
    from rac_modifier.problems.held_out import held_out_problems
    from rac_modifier.settings.sampling import SamplingSettings

    sampling = SamplingSettings(
        max_new_tokens=evaluation.cap,
        temperature=evaluation.temperature,
        top_p=TOP_P,
        top_k=0,
        batch_size=evaluation.batch_size,
        seed=0,
        **prompt.model_dump(),
    )
    problems = held_out_problems(count=evaluation.problems, **evaluation.where())
    check_problems(problems, None, ungraded=True)
    held_out = HeldOut(problems, sampling)
    if evaluation.serve and not held_out.graded:
        raise RacError(
            "evaluation.serve needs answers; name their column (answer_column), or leave serve out"
        )
    return held_out


def _about(
    model: str, evaluation: GridEvaluation, held_out: HeldOut, precision: Dtype
) -> dict[str, Any]:
    """Return what all rows of a folder share."""
    from rac_modifier.checkpoint.output_folder import local_folder
    from rac_modifier.runtime.files import public_name
    from rac_modifier.sampling.model_identity import ModelIdentity
    from rac_modifier.settings.sampling import PromptSettings

    source = public_name(evaluation.source)
    asked = [[problem.id, problem.question, problem.answer] for problem in held_out.problems]
    return {
        "model": public_name(model),
        "fingerprint": ModelIdentity.of_files(str(local_folder(resolve(model)))).fingerprint,
        "evaluation": {**evaluation.model_dump(exclude={"thinking"}), "seed": 0, "source": source},
        "prompt": PromptSettings.of(held_out.sampling).model_dump(),
        "precision": precision,
        # questions and answers: a folder is not gone on with after they change
        "problems": hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16],
    }


def _tools_of(
    model: str, evaluation: GridEvaluation, held_out: HeldOut, out: Path, precision: Dtype
) -> Tools:
    """Return what compresses, loads and serves the models of a grid."""
    from rac_modifier.checkpoint.output_folder import local_folder
    from rac_modifier.evaluation.accuracy import evaluate
    from rac_modifier.frontier.folder import slug
    from rac_modifier.frontier.run import Tools
    from rac_modifier.settings.problems import ProblemSource
    from rac_modifier.traces.store import TraceStore

    source = local_folder(resolve(model))

    def serve(folder: Path, label: str) -> EvalResult:
        answers = out / "served" / f"{slug(label)}.jsonl"
        # answers of a killed run would be counted without the seconds that they took
        for path in (answers, TraceStore.pending_path(answers)):
            path.unlink(missing_ok=True)
        concurrency = evaluation.concurrency or evaluation.batch_size
        questions = [(problem.question, held_out.sampling) for problem in held_out.problems]
        with own_server(str(folder), precision, concurrency, questions) as engine:
            return evaluate(
                *subject_of(str(folder)),
                held_out.problems,
                label=label,
                source=ProblemSource(**evaluation.where()),
                sampling=held_out.sampling,
                path=answers,
                engine=engine,
            )

    return Tools(
        source=source,
        load=lambda folder: load_on_accelerator(str(folder), precision),
        compress=lambda recipe, folder: compress(recipe, str(source), folder, "auto"),
        serve=serve if evaluation.serve else None,
    )


def report(
    folders: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="folders that rac frontier wrote")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="the page, a .html file")
    ],
    traces: Annotated[
        int,
        typer.Option(
            min=0, max=300, help="problems whose answers can be read on the page, per model"
        ),
    ] = 300,
) -> None:
    """Write a page that shows what rac frontier measured: one HTML file that needs no network.

    Accuracy and divergence against bytes and speed, thinking lengths, and the answers of the dense
    and the compressed models side by side.

    Example: rac report reasoner-frontier -o report.html
    """
    from rac_modifier.frontier.page import page
    from rac_modifier.runtime.files import write_text_atomic

    if output.suffix not in (".html", ".htm"):
        raise RacError(f"{output} is not the name of a page; use a name that ends in .html")
    text = page(folders, traces)
    write_text_atomic(output, text)
    typer.echo(f"{output}: {len(text.encode()) / 1e6:.2f} MB; open it in a browser")
