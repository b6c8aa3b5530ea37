"""`rac frontier`: a grid of recipes run on one model and measured; `rac report`: its page."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rac_modifier.cli.answering import Answering
from rac_modifier.cli.models import check_model, load_on_accelerator, resolve, unpacked
from rac_modifier.cli.options import Dtype, Model, Precision, resumable
from rac_modifier.cli.protocol import Protocol
from rac_modifier.errors import RacError

if TYPE_CHECKING:
    from rac_modifier.evaluation.results import EvalResult
    from rac_modifier.frontier.benchmarks import Benchmark, Servers
    from rac_modifier.frontier.measure import HeldOut
    from rac_modifier.frontier.run import Tools
    from rac_modifier.problems.source import Problem
    from rac_modifier.settings.grid import GridBenchmark, GridEvaluation, PlannedRow
    from rac_modifier.settings.sampling import PromptSettings

_KEPT = (
    "rows that are finished are kept, and so is what was pruned of the last one; run the same "
    "command again to go on"
)


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
    """Run a grid of recipes on a model, and measure each: divergence, accuracy, bytes, speed.

    All rows and the disk are checked before the first starts. A row that is finished is not run
    again. Models are compressed in the dtype that they are stored in; --precision is for
    measuring. rac report draws the results.

    Example: rac frontier reasoner --recipe-grid small --out reasoner-frontier
    """
    from rac_modifier.checkpoint.output_folder import check_room
    from rac_modifier.sampling.own_server import check_serving
    from rac_modifier.settings.grid import load_grid, plan_rows, shared_prompt

    grid = load_grid(recipe_grid)
    check_model(resolve(model))
    # registers the modifiers
    from rac_modifier.llmcompressor.checks import check_recipe, skeleton_of

    skeleton = skeleton_of(resolve(model))
    planned = plan_rows(grid, recipe_grid, lambda recipe: check_recipe(recipe, skeleton))
    prompt = shared_prompt(planned, recipe_grid)
    study = Study(model, planned, grid.evaluation, prompt, out, precision)
    study.check_benchmarks()
    if grid.evaluation.serve:
        check_serving()
    # dense checkpoints, and one more while a row is packed; what is there already counts
    size = sum(p.numel() * p.element_size() for p in skeleton.parameters())
    written = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    check_room(out, ((1 if remove_models else len(planned)) + 1) * size - written)
    if check:
        study.check_folder()
        typer.echo("\n".join(f"{run.label}: {run.group}" for run in planned))
        return
    with resumable(_KEPT):
        study.run(remove_models)


@dataclass(frozen=True)
class Study:
    """The rows of a grid on a model, how they are measured, and the folder of the results."""

    model: str
    planned: list[PlannedRow]
    evaluation: GridEvaluation
    prompt: PromptSettings
    out: Path
    precision: Dtype

    def run(self, remove_models: bool) -> None:
        """Run and measure what the folder does not hold yet."""
        from rac_modifier.frontier.folder import FrontierFolder
        from rac_modifier.frontier.run import check_finished, run_grid

        held_out, tools = self.held_out(), self._tools()
        with FrontierFolder(self.out) as folder:
            folder.begin(self.about(held_out))
            check_finished(folder, self.planned)
            run_grid(
                folder, self.planned, held_out, tools, remove_models=remove_models, report=_say
            )
        typer.echo(
            f"{len(self.planned) + 1} rows in {self.out}; look at them with: rac report {self.out} "
            "-o report.html"
        )

    def check_folder(self) -> None:
        """Refuse a folder whose results cannot be resumed (RacError); create nothing."""
        from rac_modifier.frontier.folder import FrontierFolder
        from rac_modifier.frontier.run import check_finished

        folder = FrontierFolder(self.out)
        if folder.about or folder.rows:
            folder.check(self.about(self.held_out()))
            check_finished(folder, self.planned)

    @property
    def source(self) -> Path:
        """Return the folder of the model."""
        from rac_modifier.checkpoint.output_folder import local_folder

        return local_folder(resolve(self.model))

    def about(self, held_out: HeldOut) -> dict[str, Any]:
        """Return what all rows of a folder share."""
        from rac_modifier.files import public_name
        from rac_modifier.sampling.model_identity import ModelIdentity

        source = public_name(self.evaluation.source)
        return {
            "model": public_name(self.model),
            "fingerprint": ModelIdentity.of_files(str(self.source)).fingerprint,
            "evaluation": {**self.evaluation.of_rows(), "source": source},
            "prompt": self.prompt.model_dump(),
            "precision": self.precision.value,
            "problems": digest_of(held_out.problems),
        }

    def held_out(self) -> HeldOut:
        """Return the problems that all rows answer (RacError: served without answers)."""
        from rac_modifier.evaluation.accuracy import TOP_P
        from rac_modifier.frontier.measure import HeldOut
        from rac_modifier.problems.held_out import held_out_problems
        from rac_modifier.settings.sampling import SamplingSettings

        evaluation = self.evaluation
        sampling = SamplingSettings(
            max_new_tokens=evaluation.cap,
            temperature=evaluation.temperature,
            top_p=TOP_P,
            top_k=0,
            batch_size=evaluation.batch_size,
            **self.prompt.model_dump(),
        )
        problems = held_out_problems(count=evaluation.problems, seed=0, **evaluation.where())
        held_out = HeldOut(problems, sampling)
        if evaluation.serve and not held_out.graded:
            raise RacError(
                "evaluation.serve asks problems with answers; name their column (answer_column), "
                "or leave serve out"
            )
        return held_out

    def _tools(self) -> Tools:
        import yaml

        from rac_modifier.frontier.run import Tools

        source, precision = self.source, self.precision

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
            **(self.served() if self.evaluation.serve else {}),
            benchmarks=[benchmark for benchmark, _, _ in self.benchmarks.values()],
            ask=self.ask,
        )

    def served(self) -> dict[str, Any]:
        """Return the tools of `serve: true`: a server per model, and what measures its speed."""
        from rac_modifier.frontier.folder import slug
        from rac_modifier.sampling.own_server import ServerOnDemand, VllmCommand, vllm_server
        from rac_modifier.settings.problems import ProblemSource

        command, precision = VllmCommand.from_environment(), self.precision
        held_out, source = self.held_out(), ProblemSource(**self.evaluation.where())

        @contextmanager
        def servers(folder: Path) -> Iterator[Servers]:
            start = lambda: vllm_server(command, str(folder), precision.value)  # noqa: E731
            with ServerOnDemand(start) as server:
                yield server.asked

        def serve(folder: Path, label: str, servers: Servers) -> EvalResult:
            answers = self.out / "served" / f"{slug(label)}.jsonl"
            # answers of a killed run would be counted without the seconds that they took
            answers.unlink(missing_ok=True)
            with servers() as urls:
                answering = self._answering(urls, answers)
                return answering.run(
                    [str(folder)], held_out.problems, source, held_out.sampling, {}
                )[0]

        return {"servers": servers, "serve": serve}

    def check_benchmarks(self) -> None:
        """Refuse benchmarks that cannot be asked, before problems are loaded (RacError)."""
        for benchmark in self.evaluation.benchmarks:
            protocol_of(benchmark).check_installed()

    @cached_property
    def benchmarks(self) -> dict[str, tuple[Benchmark, Protocol, list[Problem]]]:
        """Return the benchmarks as plain values without paths, and their problems by preset."""
        from rac_modifier.files import without_paths
        from rac_modifier.frontier.benchmarks import Benchmark

        loaded = {}
        for benchmark in self.evaluation.benchmarks:
            protocol = protocol_of(benchmark)
            problems = protocol.load(0)
            values = {**protocol.record(len(problems)), "seed": 0, "questions": digest_of(problems)}
            listed = Benchmark(benchmark.preset, without_paths(values))
            loaded[benchmark.preset] = listed, protocol, problems
        return loaded

    def ask(
        self, model: Path, label: str, benchmarks: Sequence[Benchmark], servers: Servers
    ) -> Iterator[tuple[Benchmark, EvalResult]]:
        """Yield each result; answers are kept, so that a run that was killed goes on."""
        from rac_modifier.frontier.folder import slug

        with servers() as urls:
            for benchmark in benchmarks:
                _, protocol, problems = self.benchmarks[benchmark.name]
                path = self.out / "benchmarks" / f"{slug(label)}-{benchmark.name}.jsonl"
                sampling = protocol.sampling(self.prompt, self.evaluation.batch_size, seed=0)
                asked = problems, protocol.problem_source, sampling, protocol.verifiers()
                (result,) = self._answering(urls, path).run([str(model)], *asked)
                yield benchmark, result

    def _answering(self, urls: tuple[str, ...], path: Path) -> Answering:
        return Answering(urls, (), False, self.evaluation.in_progress, path, self.precision)


def protocol_of(benchmark: GridBenchmark) -> Protocol:
    """Return what is asked, as `rac eval --preset` would ask it (RacError: no such preset)."""
    written = benchmark.model_dump(exclude={"preset"}, exclude_none=True)
    unset: dict[str, Any] = dict.fromkeys(("column", "answer_column", "temperature", "top_p"))
    options = {"source": "", "problems": 1, "samples": 1, "cap": 1, **unset, **written}
    return Protocol(**options).with_preset(benchmark.preset, written.keys())


def digest_of(problems: Sequence[Problem]) -> str:
    """Return a digest of questions and answers: a folder is not gone on with after they change."""
    content = [[problem.id, problem.question, problem.answer] for problem in problems]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _say(row: dict[str, Any]) -> None:
    words = [f"{row['label']}: {row['bytes']['total'] / 1e6:,.2f} MB"]
    if divergence := row["divergence"]:
        words.append(f"KL {divergence['kl']:.3g}, top-1 {divergence['agreement']:.1%}")
    if row["accuracy"]:
        words.append(f"accuracy {row['accuracy']['accuracy']:.1%}")
    typer.echo(", ".join(words))


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

    Accuracy and divergence against bytes and speed, the layers of each row, thinking lengths, and
    the answers of the dense and the compressed models side by side.

    Example: rac report reasoner-frontier -o report.html
    """
    from rac_modifier.files import write_text_atomic
    from rac_modifier.frontier.page import check_size, page, problems_shown

    if output.suffix not in (".html", ".htm"):
        raise RacError(f"{output} is not the name of a page; use a name that ends in .html")
    if not output.absolute().parent.is_dir():
        raise RacError(f"{output}: its folder does not exist; create it first")
    text = page(folders, traces)
    check_size(text, output, problems_shown(folders, traces))
    write_text_atomic(output, text)
    typer.echo(f"{output}: {len(text.encode()) / 1e6:.2f} MB; open it in a browser")
