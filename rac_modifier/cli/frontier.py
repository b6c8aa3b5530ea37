"""`rac frontier`: a grid of recipes run on one model and measured side by side."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rac_modifier.cli.benchmarks import AskedBenchmarks, digest_of
from rac_modifier.cli.models import check_model, resolve
from rac_modifier.cli.options import Dtype, Model, Precision, resumable
from rac_modifier.errors import RacError

if TYPE_CHECKING:
    from rac_modifier.evaluation.results import EvalResult
    from rac_modifier.frontier.benchmarks import Servers
    from rac_modifier.frontier.measure import HeldOut
    from rac_modifier.frontier.run import Tools
    from rac_modifier.settings.grid import GridEvaluation, PlannedRow
    from rac_modifier.settings.sampling import PromptSettings

_KEPT = "rows that are finished are kept, and so is what was pruned of the last one; run the same command again to go on"


def frontier(
    model: Model,
    recipe_grid: Annotated[
        str,
        typer.Option(
            "--recipe-grid",
            metavar="GRID",
            help="a YAML file, or a shipped grid: small, paper, contenders, ...",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(help="folder of the results; a folder with finished rows is gone on with"),
    ],
    precision: Precision = Dtype.AUTO,
    remove_models: Annotated[
        bool, typer.Option("--remove-models", help="remove each checkpoint when it is measured")
    ] = False,
    check: Annotated[
        bool,
        typer.Option("--check", help="only check the grid and the disk, list the rows, and exit"),
    ] = False,
) -> None:
    """Run a grid of recipes on a model, and measure each: divergence, accuracy, bytes, speed and benchmarks where asked.

    All rows and the disk are checked before the first starts. A row that is finished is not run
    again. Models are compressed in the dtype that they are stored in; --precision is that of measuring. rac report draws the
    results.

    Example: rac frontier reasoner --recipe-grid small --out reasoner-frontier
    """
    from rac_modifier.sampling.vllm_command import check_serving
    from rac_modifier.settings.grid import load_grid, plan_rows, shared_prompt

    grid = load_grid(recipe_grid)
    source = resolve(model)
    check_model(source)
    skeleton = _skeleton(source)
    planned = plan_rows(grid, recipe_grid, _check_on(skeleton))
    prompt = shared_prompt(planned, recipe_grid)
    benchmarks = AskedBenchmarks(grid.evaluation, prompt, precision, out)
    benchmarks.check()
    if grid.evaluation.serve:
        check_serving()
    asked = _Asked(model, planned, grid.evaluation, prompt, out, precision)
    _check_disk(skeleton, out, len(planned) if not remove_models else 1)
    if check:
        _check_folder(asked)
        typer.echo("\n".join(f"{run.label}: {run.group}" for run in planned))
        return
    with resumable(_KEPT):
        _run(asked, remove_models, benchmarks)


@dataclass(frozen=True)
class _Asked:
    """The rows of a grid on a model, how they are measured, and where the results go."""

    model: str
    planned: list[PlannedRow]
    evaluation: GridEvaluation
    prompt: PromptSettings
    out: Path
    precision: Dtype

    @property
    def source(self) -> Path:
        """The folder of the model."""
        from rac_modifier.checkpoint.output_folder import local_folder

        return local_folder(resolve(self.model))

    def about(self, held_out: HeldOut) -> dict[str, Any]:
        """What all rows of a folder share."""
        from rac_modifier.machine_paths import public_name
        from rac_modifier.sampling.model_identity import ModelIdentity

        return {
            "model": public_name(self.model),
            "fingerprint": ModelIdentity.of_files(str(self.source)).fingerprint,
            "evaluation": {
                **self.evaluation.of_rows(),
                "source": public_name(self.evaluation.source),
            },
            "prompt": self.prompt.model_dump(),
            "precision": self.precision.value,
            "problems": digest_of(held_out.problems),
        }


def _skeleton(source: str) -> Any:
    """The model with shapes and without weights."""
    import rac_modifier  # noqa: F401 - registers the modifiers
    from rac_modifier.llmcompressor.check_recipe import skeleton_of

    return skeleton_of(source)


def _check_disk(skeleton: Any, out: Path, checkpoints: int) -> None:
    """Refuse a grid whose checkpoints do not fit on the disk of `out`; what `out` holds already counts as room.

    Counted are dense checkpoints, and one more while a row is packed.

    Raises:
        RacError: with the bytes needed and free.
    """
    import shutil

    model = sum(p.numel() * p.element_size() for p in skeleton.parameters())
    need = (checkpoints + 1) * model
    folder = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    written = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    free = shutil.disk_usage(folder).free + written
    if need > free:
        raise RacError(
            f"{out}: {free / 2**30:.1f} GiB are free, and its checkpoints need up to {need / 2**30:.1f} GiB; "
            "free some, name a folder on another disk, or use --remove-models"
        )


def _check_on(skeleton: Any) -> Any:
    """A check of recipes against the shapes of a model."""
    from rac_modifier.llmcompressor.check_recipe import check_recipe

    return lambda recipe: check_recipe(recipe, skeleton)


def _run(asked: _Asked, remove_models: bool, benchmarks: AskedBenchmarks) -> None:
    from rac_modifier.frontier.folder import FrontierFolder
    from rac_modifier.frontier.run import check_finished, run_grid

    held_out, tools = _held_out(asked.evaluation, asked.prompt), _tools(asked, benchmarks)
    with FrontierFolder(asked.out) as folder:
        folder.begin(asked.about(held_out))
        check_finished(folder, asked.planned)
        run_grid(folder, asked.planned, held_out, tools, remove_models=remove_models, report=_say)
    typer.echo(
        f"{len(asked.planned) + 1} rows in {asked.out}; look at them with: rac report {asked.out} -o report.html"
    )


def _check_folder(asked: _Asked) -> None:
    """Refuse a folder whose results cannot be gone on with; a new one is not made."""
    from rac_modifier.frontier.folder import FrontierFolder
    from rac_modifier.frontier.run import check_finished

    folder = FrontierFolder(asked.out)
    if folder.about or folder.rows:
        folder.check(asked.about(_held_out(asked.evaluation, asked.prompt)))
        check_finished(folder, asked.planned)


def _tools(asked: _Asked, benchmarks: AskedBenchmarks) -> Tools:
    import yaml

    from rac_modifier.cli.models import load_on_accelerator, unpacked
    from rac_modifier.frontier.run import Tools

    source, evaluation, precision = asked.source, asked.evaluation, asked.precision

    def compress(recipe: dict[str, Any], folder: Path) -> None:
        from llmcompressor import oneshot

        oneshot(
            model=unpacked(str(source), Dtype.AUTO),
            recipe=yaml.safe_dump(recipe, sort_keys=False),
            precision=Dtype.AUTO.value,
            output_dir=str(folder),
        )

    return Tools(
        source=source,
        load=lambda folder: load_on_accelerator(str(folder), precision),
        compress=compress,
        **(_served(evaluation, asked.prompt, precision, asked.out) if evaluation.serve else {}),
        benchmarks=benchmarks.listed,
        ask=benchmarks.ask,
    )


def _served(
    evaluation: GridEvaluation, prompt: PromptSettings, precision: Dtype, out: Path
) -> dict[str, Any]:
    """Tools for `serve: true`: one server per model, and what measures its speed.

    The answers are kept beside the results, and asked anew after a kill.
    """
    from rac_modifier.cli.answering import Answering
    from rac_modifier.frontier.folder import slug
    from rac_modifier.sampling.own_server import ServerOnDemand, vllm_server
    from rac_modifier.sampling.vllm_command import VllmCommand

    command = VllmCommand.from_environment()  # refused before hours of work
    problems = _problems(evaluation)
    where, limits = evaluation.where(), _limits(evaluation)

    @contextmanager
    def servers(folder: Path) -> Iterator[Servers]:
        with ServerOnDemand(lambda: vllm_server(command, str(folder), precision.value)) as server:
            yield server.asked

    def serve(folder: Path, label: str, servers: Servers) -> EvalResult:
        answers = out / "served" / f"{slug(label)}.jsonl"
        # answers of a run that was killed would be counted without the seconds that they took
        answers.unlink(missing_ok=True)
        with servers() as urls:
            answering = Answering(urls, evaluation.in_progress, 1, answers)
            return answering.run(str(folder), problems, where, limits, prompt, precision, {})

    return {"servers": servers, "serve": serve}


def _held_out(evaluation: GridEvaluation, prompt: PromptSettings) -> HeldOut:
    from rac_modifier.frontier.measure import HeldOut
    from rac_modifier.settings.sampling import SamplingSettings

    problems = _problems(evaluation)
    held_out = HeldOut(
        problems, SamplingSettings(top_k=0, **_limits(evaluation), **prompt.model_dump())
    )
    if evaluation.serve and not held_out.graded:
        raise RacError(
            "evaluation.serve asks problems with answers; name their column (answer_column), or leave serve out"
        )
    return held_out


def _problems(evaluation: GridEvaluation) -> list[Any]:
    from rac_modifier.problems.held_out import held_out_problems

    return held_out_problems(count=evaluation.problems, seed=0, **evaluation.where())


def _limits(evaluation: GridEvaluation) -> dict[str, Any]:
    from rac_modifier.evaluation.accuracy import TOP_P

    return {
        "max_new_tokens": evaluation.cap,
        "temperature": evaluation.temperature,
        "top_p": TOP_P,
        "batch_size": evaluation.batch_size,
        "seed": 0,
    }


def _say(row: dict[str, Any]) -> None:
    parts = [f"{row['label']}: {row['bytes']['total'] / 1e6:,.2f} MB"]
    if row["divergence"]:
        parts.append(
            f"KL {row['divergence']['kl']:.3g}, top-1 {row['divergence']['agreement']:.1%}"
        )
    if outside := row.get("outside_repetitions"):  # rows of earlier versions do not have it
        parts.append(f"KL outside of repetitions {outside['kl']:.3g}")
    if row["accuracy"]:
        parts.append(f"accuracy {row['accuracy']['accuracy']:.1%}")
    typer.echo(", ".join(parts))
