"""What a user writes in a grid for `rac frontier`: rows, what they share, how they are measured."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from rac_modifier.errors import RacError
from rac_modifier.settings.check import Batch, Count, Seed, Settings, check_settings, refuse_idle
from rac_modifier.settings.entries import ENTRIES
from rac_modifier.settings.problems import ProblemSource
from rac_modifier.settings.recipe import NAME, CheckedRecipe, set_values
from rac_modifier.settings.recipe_files import read_yaml
from rac_modifier.settings.sampling import PromptSettings

DENSE = "dense"
"""Label and group of the row that all others are compared with."""
FOLDER = Path(__file__).parents[1] / "grids"


class GridEvaluation(Settings):
    """How every model of the grid is measured: on the same held-out problems, once each."""

    source: str = Field("arithmetic", min_length=1)
    """Problems, as `rac eval --source` takes them."""

    column: str | None = None
    """Column of the question (file or dataset)."""

    answer_column: str | None = None
    """Column of the answer; without answers no accuracy is measured."""

    split: str = "train"
    """Split of a Hugging Face dataset."""

    problems: Count = 100
    """How many problems."""

    cap: Count = 512
    """Most new tokens per answer."""

    temperature: float = Field(0.0, ge=0, le=100)
    """0 is greedy; above 0 answers are sampled with top-p 0.95."""

    batch_size: Batch = 64
    """Answers generated together."""

    thinking: bool | None = None
    """The enable_thinking of the chat template; default: as in calibration."""

    serve: bool = False
    """Measure tokens per second of a `vllm serve` of each model too."""

    concurrency: int | None = Field(None, ge=1, le=4096)
    """With serve: answers in progress at a time; default: batch_size."""

    @model_validator(mode="after")
    def _only_what_counts(self) -> Self:
        refuse_idle(self, (not self.serve, "concurrency", "without serve: true"))
        ProblemSource(**self.where())
        return self

    def where(self) -> dict[str, Any]:
        """Return the fields of `ProblemSource` that say where the problems come from."""
        return self.model_dump(include={"source", "column", "answer_column", "split"})


class _GridRow(Settings):
    """One recipe of the grid."""

    label: str = Field(min_length=1, max_length=80)
    """Name of the row; unique."""

    recipe: str | dict[str, Any]
    """A shipped recipe's name, a file, or the modifiers themselves: {GPTQModifier: {...}, ...}."""

    group: str | None = Field(None, min_length=1, max_length=40)
    """Rows of one colour; default: by what the recipe does."""

    seeds: list[Seed] | None = Field(None, min_length=1, max_length=1000)
    """Run the row once per seed (calibration.seed); the seed becomes part of the label."""

    set: dict[str, Any] = {}
    """Changed settings of our entry, such as {sparsity: 0.6}; null takes one out."""


class Grid(Settings):
    """A file for `rac frontier --recipe-grid`."""

    shared: dict[Literal["traces", "calibration"], dict[str, Any]] = {}
    """Settings of our entry that replace those of each recipe."""

    evaluation: GridEvaluation = GridEvaluation()
    """How all rows are measured."""

    rows: list[_GridRow] = Field(min_length=1)
    """The recipes."""


@dataclass(frozen=True)
class PlannedRow:
    """A run: a row of the grid, with one of its seeds where it names several.

    `row` is the grid's label, which all seeds share; `recipe` is empty for the dense model.
    """

    label: str
    row: str
    group: str
    seed: int | None
    recipe: dict[str, Any]
    prompts: tuple[PromptSettings, ...] = ()


def _grid_names() -> list[str]:
    """Return the names of the grids that ship with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_grid(named: str | Path) -> Grid:
    """Return the grid of a path or of a shipped grid's name (RacError: it is no grid)."""
    path = FOLDER / f"{named}.yaml" if str(named) in _grid_names() else Path(named)
    content = read_yaml(path, "grid", f"name a YAML file, or one of {', '.join(_grid_names())}")
    return check_settings(Grid, content, str(path))


def plan_rows(
    grid: Grid, where: str, check: Callable[[dict[str, Any]], None] = lambda recipe: None
) -> list[PlannedRow]:
    """Return every run of the grid `where`, each checked before the first starts (RacError)."""
    planned: list[PlannedRow] = []
    wrong: list[str] = []
    labels = [DENSE]
    for row in grid.rows:
        seeds = [None] if row.seeds is None else row.seeds
        for seed in seeds:
            label = row.label if seed is None else f"{row.label}, seed {seed}"
            labels.append(label)
            try:
                run = _run(row, grid, label, seed)
                check(run.recipe)
                planned.append(run)
            except RacError as error:
                wrong.append(f"{row.label}: {error}")
                break
    for label in dict.fromkeys(label for label in labels if labels.count(label) > 1):
        dense = " (it is that of the dense model)" if label == DENSE else ""
        wrong.append(f"{label}: this label is used twice{dense}; give each row its own")
    if wrong:
        possible = ", ".join(run.label for run in planned) or "none"
        raise RacError(
            "\n- ".join([f"{where}: nothing was started, because of", *wrong])
            + f"\nRows that could run: {possible}"
        )
    return planned


def shared_prompt(
    planned: list[PlannedRow], evaluation: GridEvaluation, where: str
) -> PromptSettings:
    """Return the prompt settings of the evaluation (RacError: rows calibrate with different ones).

    `evaluation.thinking`, if it is set, replaces the value that rows calibrate with.
    """
    asked = evaluation.model_dump(include={"thinking"}, exclude_none=True)
    prompts = [prompt.model_copy(update=asked) for run in planned for prompt in run.prompts]
    described = sorted({prompt.describe() for prompt in prompts})
    if len(described) > 1:
        raise RacError(
            f"{where}: its rows calibrate with different prompts ({'; '.join(described)}), and all "
            "models must be asked with one; set template and system_prompt under shared: traces: "
            "sampling, and thinking there or under evaluation"
        )
    return prompts[0] if prompts else PromptSettings(**asked)


def _run(row: _GridRow, grid: Grid, label: str, seed: int | None) -> PlannedRow:
    """Return a run whose recipe has what is shared, what the row sets, and the seed."""
    recipe = _whole(row)
    values = {**row.set, **({} if seed is None else {"calibration.seed": seed})}
    group = "dense quantized"
    modifiers = {name for name, _ in recipe.modifiers}
    if not modifiers & ENTRIES.keys():
        if values:
            raise RacError(
                f"{', '.join(values)} changes an entry of ours, and its recipe has none; leave set "
                "and seeds out"
            )
        return PlannedRow(label, row.label, row.group or group, None, recipe.content)
    name, entry = recipe.entry
    for part, shared in grid.shared.items():
        entry[part] = _merged(entry.get(part), shared)
    set_values(entry, values)
    checked = recipe.check()
    asking = [
        checked.traces.named(part.name) for part in checked.calibration.parts("traces", "prompts")
    ]
    evaluated = ProblemSource(**grid.evaluation.where())
    if not evaluated.is_generator and any(_are_same(p.problems, evaluated) for p in asking):
        step = "source" if evaluated.is_file else "source or split"
        raise RacError(
            f"calibrates on {evaluated.source}, the problems of the evaluation; name another {step}"
        )
    others = modifiers - {name, "REAPPruningModifier"}
    quantizes = others or getattr(checked, "quantization", None)
    if name == NAME and getattr(checked, "prunes", True):
        group = "sparse + quantized" if quantizes else "sparse"
    elif not quantizes:
        group = "fewer experts"
    prompts = tuple(PromptSettings.of(part.sampling) for part in asking)
    return PlannedRow(label, row.label, row.group or group, seed, recipe.content, prompts)


def _are_same(first: ProblemSource, second: ProblemSource) -> bool:
    """Tell whether two sources are the same file, or the same split of a dataset.

    An evaluation names no configuration, so configurations are not compared.
    """
    if first.is_file and second.is_file:
        return Path(first.source).resolve() == Path(second.source).resolve()
    return (first.source, first.split) == (second.source, second.split)


def _whole(row: _GridRow) -> CheckedRecipe:
    """Return the recipe of a row in the layout that llm-compressor reads."""
    if isinstance(row.recipe, str):
        return CheckedRecipe.read(row.recipe)
    has_stages = any(str(key).endswith("_stage") for key in row.recipe)
    content = row.recipe if has_stages else {"frontier_stage": {"frontier_modifiers": row.recipe}}
    return CheckedRecipe(copy.deepcopy(content), "its recipe")


def _merged(below: Any, above: Mapping[str, Any]) -> dict[str, Any]:
    """Return `below` with the values of `above`, group by group."""
    result = copy.deepcopy(below) if isinstance(below, dict) else {}
    for key, value in above.items():
        is_group = isinstance(value, Mapping)
        result[key] = _merged(result.get(key), value) if is_group else copy.deepcopy(value)
    return result
