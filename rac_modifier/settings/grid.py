"""What a user writes in a grid of recipes for `rac frontier`: named rows, what they share, and how all of them are measured."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from rac_modifier.errors import RacError
from rac_modifier.settings.base import Settings
from rac_modifier.settings.check import check_settings
from rac_modifier.settings.entries import CalibrationEntry
from rac_modifier.settings.grid_benchmarks import GridBenchmark
from rac_modifier.settings.problems import ProblemSource
from rac_modifier.settings.prompt import PromptSettings
from rac_modifier.settings.recipe import (
    NAME,
    apply_overrides,
    check_entry,
    check_layout,
    find_named_entry,
    has_entry,
    read_recipe,
)
from rac_modifier.settings.strict_yaml import read_yaml

DENSE = "dense"
"""Label and group of the row that all others are compared with."""
FOLDER = Path(__file__).parents[1] / "grids"
_STAGE = (
    "frontier_stage",
    "frontier_modifiers",
)  # around the entries of a recipe that is written in the grid


class GridEvaluation(Settings):
    """How every model of the grid is measured: on the same held-out problems, once each."""

    source: str = Field(
        "arithmetic", min_length=1, description="problems, as `rac eval --source` takes them"
    )
    column: str | None = Field(None, description="column of the question (file or dataset)")
    answer_column: str | None = Field(
        None, description="column of the answer; without answers no accuracy is measured"
    )
    split: str = Field("train", description="split of a Hugging Face dataset")
    problems: int = Field(100, ge=1, description="how many problems")
    cap: int = Field(512, ge=1, description="most new tokens per answer")
    temperature: float = Field(0.0, ge=0, description="0 is greedy")
    top_p: float | None = Field(
        None, gt=0, le=1, description="with a temperature above 0; default 0.95"
    )
    batch_size: int = Field(64, ge=1, description="answers generated together")
    seed: int = Field(0, description="of the problems and the sampling")
    serve: bool = Field(
        False,
        description="measure tokens per second of a `vllm serve` of each model, too, and ask it the benchmarks",
    )
    concurrency: int | None = Field(
        None,
        ge=1,
        le=4096,
        description="with serve: answers in progress at once; default: batch_size",
    )
    benchmarks: list[GridBenchmark] = Field(
        [], description="published benchmarks that each model is asked, besides"
    )

    @model_validator(mode="after")
    def _only_what_counts(self) -> Self:
        names = [benchmark.preset for benchmark in self.benchmarks]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise RacError(f"benchmarks names {twice} twice; name each once")
        if self.concurrency is not None and not self.serve:
            raise RacError(
                f"concurrency={self.concurrency} is for a server; set serve: true, or set batch_size"
            )
        if self.top_p is not None and not self.temperature:
            raise RacError(
                f"top_p={self.top_p:g} has no effect on greedy answers; set a temperature, or leave it out"
            )
        ProblemSource(**self.where())
        return self

    def where(self) -> dict[str, Any]:
        """The fields of `ProblemSource` that say where the problems come from."""
        return self.model_dump(include={"source", "column", "answer_column", "split"})

    @property
    def in_progress(self) -> int:
        """Answers of a server that are in progress at once."""
        return self.concurrency or self.batch_size

    def of_rows(self) -> dict[str, Any]:
        """What all rows of a folder share; benchmarks can be added later."""
        later = {"split": "train", "concurrency": None}  # settings that older folders do not have
        values = self.model_dump(exclude={"benchmarks"})
        return {
            name: value
            for name, value in values.items()
            if name not in later or value != later[name]
        }


class GridRow(Settings):
    """One recipe of the grid."""

    label: str = Field(min_length=1, max_length=80, description="name of the row; unique")
    recipe: str | dict[str, Any] = Field(
        description="a shipped recipe's name, a file, or the modifiers themselves: {GPTQModifier: {...}, ...}"
    )
    group: str | None = Field(
        None,
        min_length=1,
        max_length=40,
        description="rows of one colour; default: by what the recipe does",
    )
    seeds: list[int] | None = Field(
        None,
        min_length=1,
        description="run the row once per seed (calibration.seed); the seed becomes part of the label",
    )
    set: dict[str, Any] = Field(
        {}, description="changed settings of our entry, such as {sparsity: 0.6}; null takes one out"
    )

    @field_validator("label", mode="before")
    @classmethod
    def _is_text(cls, label: Any) -> Any:
        if isinstance(label, int | float):
            raise RacError(
                f'label {label} is a number (YAML reads 2:4 as 124); write it in quotes, such as "2:4"'
            )
        return label


class GridShared(Settings):
    """Settings that replace those of each recipe."""

    traces: dict[str, Any] = Field({}, description="of our entry, as in a recipe")
    calibration: dict[str, Any] = Field({}, description="of our entry, as in a recipe")


class Grid(Settings):
    """A file for `rac frontier --recipe-grid`."""

    shared: GridShared = Field(GridShared(), description="what all rows share")
    evaluation: GridEvaluation = Field(GridEvaluation(), description="how all rows are measured")
    rows: list[GridRow] = Field(min_length=1, description="the recipes")


@dataclass(frozen=True)
class PlannedRow:
    """One run: a row of the grid with one of its seeds.

    Attributes:
        label: unique in the grid.
        row: the grid's label, which the runs of several seeds share.
        group: of a colour.
        seed: the one that the grid names, or None.
        recipe: whole, as `oneshot` takes it.
        prompts: the prompt settings that it calibrates with.
        sources: the problems that it calibrates on; none without a modifier of ours, as for round-to-nearest.
    """

    label: str
    row: str
    group: str
    seed: int | None
    recipe: dict[str, Any]
    prompts: tuple[PromptSettings, ...]
    sources: frozenset[str]


def grid_names() -> list[str]:
    """The names of the grids that ship with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_grid(named: str | Path) -> Grid:
    """A grid, its layout checked; `named` is a path, or the name of a grid that ships with the package.

    Raises:
        RacError: no such file, not YAML, no grid, or settings that do not exist.
    """
    path = FOLDER / f"{named}.yaml" if str(named) in grid_names() else Path(named)
    content = read_yaml(path, "grid", f"name a YAML file, or one of {', '.join(grid_names())}")
    if has_entry(content) and "rows" not in content:
        raise RacError(
            f"{path} is a recipe and no grid; write a grid with rows: [{{label: one, recipe: {path}}}]"
        )
    if not isinstance(content, dict):
        what = "is empty" if content is None else f"holds no grid but {type(content).__name__}"
        raise RacError(f"{path} {what}; write it as rows: [{{label: one, recipe: rac_2of4}}]")
    return check_settings(Grid, content, str(path))


def plan_rows(
    grid: Grid, where: str, check: Callable[[dict[str, Any]], None] = lambda recipe: None
) -> list[PlannedRow]:
    """Every run of the grid, checked before any of them starts.

    Args:
        grid: as it was read.
        where: its name, for messages.
        check: called with each recipe; what it raises counts as that row's mistake.

    Raises:
        RacError: with the mistakes of all rows, and the labels of those that could run.
    """
    planned: list[PlannedRow] = []
    wrong: list[str] = []
    for row in grid.rows:
        try:
            runs = _runs(row, grid)
            for run in runs:
                check(run.recipe)
        except RacError as error:
            wrong.append(f"{row.label}: {error}")
        else:
            planned += runs
    labels = [DENSE, *(label for row in grid.rows for label in _labels(row))]
    for label in dict.fromkeys(label for label in labels if labels.count(label) > 1):
        own = " (it is that of the dense model)" if label == DENSE else ""
        wrong.append(f"{label}: this label is used twice{own}; give each row its own")
    if wrong:
        others = ", ".join(run.label for run in planned) or "none"
        raise RacError(
            "\n- ".join([f"{where}: nothing was started, because of", *wrong])
            + f"\nRows that could run: {others}"
        )
    return planned


def shared_prompt(planned: list[PlannedRow], where: str) -> PromptSettings:
    """The prompt settings that the rows calibrate with, for the evaluation of all models.

    Raises:
        RacError: rows that differ.
    """
    found = {prompt.describe(): prompt for run in planned for prompt in run.prompts}
    if len(found) > 1:
        raise RacError(
            f"{where}: its rows calibrate with different prompts ({'; '.join(found)}), and all models must be asked with one; "
            "set template, system_prompt and thinking under shared: traces: sampling"
        )
    return next(iter(found.values()), PromptSettings())


def _labels(row: GridRow) -> list[str]:
    return [row.label] if row.seeds is None else [f"{row.label}, seed {seed}" for seed in row.seeds]


def _runs(row: GridRow, grid: Grid) -> list[PlannedRow]:
    """The runs of one row."""
    whole = _whole(row)
    if not has_entry(whole):
        return [_without_calibration(row, whole)]
    runs: list[PlannedRow] = []
    seeds: list[int | None] = [None] if row.seeds is None else [*row.seeds]
    for label, seed in zip(_labels(row), seeds, strict=True):
        name, recipe, entry = _recipe(row, grid, seed)
        checked = check_entry(entry, "its recipe", name)
        parts = [
            checked.traces.named(part.name)
            for part in checked.calibration.parts("traces", "prompts")
        ]
        sources = frozenset(part.problems.source for part in parts)
        evaluated = ProblemSource(source=grid.evaluation.source)
        if evaluated.source in sources and not evaluated.is_generator:
            raise RacError(
                f"calibrates on {evaluated.source}, whose problems are those of the evaluation; name another file or dataset"
            )
        group = row.group or _group(name, checked, recipe)
        prompts = tuple(PromptSettings.of(part.sampling) for part in parts)
        runs.append(PlannedRow(label, row.label, group, seed, recipe, prompts, sources))
    return runs


def _without_calibration(row: GridRow, recipe: Any) -> PlannedRow:
    """A row of upstream's modifiers alone, which no trace reaches: `check_recipe` refuses those that calibrate."""
    for name, value in {"set": row.set, "seeds": row.seeds}.items():
        if value:
            raise RacError(
                f"{name}: {value!r} changes an entry of ours, and its recipe has none; leave {name} out"
            )
    check_layout(recipe, "its recipe")
    return PlannedRow(
        row.label, row.label, row.group or "dense quantized", None, recipe, (), frozenset()
    )


def _whole(row: GridRow) -> Any:
    """The recipe of a row in the layout that llm-compressor reads."""
    if isinstance(row.recipe, str):
        return read_recipe(row.recipe)
    stage, group = _STAGE
    whole = any(str(key).endswith("_stage") for key in row.recipe)
    return copy.deepcopy(row.recipe if whole else {stage: {group: row.recipe}})


def _recipe(
    row: GridRow, grid: Grid, seed: int | None
) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """The name of our entry, the whole recipe, and its entry, with what is shared and what the row sets."""
    recipe = _whole(row)
    name, entry = find_named_entry(recipe, "its recipe")
    for part in ("traces", "calibration"):
        if shared := getattr(grid.shared, part):
            entry[part] = _merged(entry.get(part) or {}, shared)
    values = {**row.set, **({} if seed is None else {"calibration.seed": seed})}
    apply_overrides(entry, [f"{key}={json.dumps(value)}" for key, value in values.items()])
    return name, recipe, entry


def _merged(own: Mapping[str, Any], shared: Mapping[str, Any]) -> dict[str, Any]:
    """`own` with the values of `shared`, group by group."""
    result = copy.deepcopy(dict(own))
    for key, value in shared.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = _merged(result[key], value) if both else copy.deepcopy(value)
    return result


def _group(name: str, entry: CalibrationEntry, recipe: dict[str, Any]) -> str:
    """What the recipe does, for a row without a group."""
    modifiers = [
        modifier for groups in recipe.values() for group in groups.values() for modifier in group
    ]
    if name != NAME or not getattr(entry, "prunes", True):
        return "dense quantized"
    return (
        "sparse + quantized"
        if getattr(entry, "quantization", None) or len(modifiers) > 1
        else "sparse"
    )
