"""A grid of recipes, row by row: compressed, measured, written. Finished rows are not run again."""

import gc
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from loguru import logger

from rac_modifier.checkpoint.card import RUN_RECORD_NAME
from rac_modifier.errors import RacError
from rac_modifier.evaluation.results import EvalResult
from rac_modifier.frontier.folder import FrontierFolder
from rac_modifier.frontier.measure import HeldOut, checkpoint_bytes, measure, measure_dense
from rac_modifier.runtime.files import read_json, remove_folder, without_paths, write_json_atomic
from rac_modifier.settings.grid import DENSE, PlannedRow

RECIPE_NAME = "frontier_recipe.json"  # in a checkpoint: the recipe that it was compressed with


@dataclass(frozen=True)
class Tools:
    """What a row needs of other libraries."""

    source: Path  # of the dense model
    load: Callable[[Path], tuple[Any, Any]]  # the model of a folder in memory, and its tokenizer
    compress: Callable[[dict[str, Any], Path], None]  # apply a recipe, and save to a folder
    serve: Callable[[Path, str], EvalResult] | None = None  # None: not asked for


def check_finished(folder: FrontierFolder, planned: Sequence[PlannedRow]) -> None:
    """Refuse a grid in which a row or its checkpoint has another recipe now (RacError: names)."""
    changed = [
        run.label
        for run in planned
        if (row := folder.row(run.label)) and row["recipe"] != without_paths(run.recipe)
    ]
    if changed:
        raise RacError(
            f"{folder.folder} has rows that were run with another recipe: {', '.join(changed)}; "
            "give the new ones another label, or name another folder"
        )
    for run in planned:
        model = folder.model(run.label)
        if folder.row(run.label) or not model.exists():
            continue
        path = model / RECIPE_NAME
        if not path.exists() or read_json(path, f"remove {model}") != without_paths(run.recipe):
            raise RacError(
                f"{model} is not known to be compressed with the recipe of {run.label!r}; remove "
                "it, or give the row another label"
            )


def run_grid(
    folder: FrontierFolder,
    planned: Sequence[PlannedRow],
    held_out: HeldOut,
    tools: Tools,
    *,
    remove_models: bool = False,
) -> None:
    """Run and measure every row that is not finished, the dense model first."""
    check_finished(folder, planned)
    dense = PlannedRow(DENSE, DENSE, DENSE, None, {})
    for number, run in enumerate([dense, *planned]):
        if folder.row(run.label) is None:
            logger.info(f"{run.label}: row {number} of {len(planned)}")
            _finish(folder, run, held_out, tools)
            if remove_models:
                remove_folder(folder.model(run.label))


def _finish(folder: FrontierFolder, run: PlannedRow, held_out: HeldOut, tools: Tools) -> None:
    """Compress and measure a model, and write its row."""
    model_folder, compressing = tools.source, None
    if run.recipe:
        model_folder = folder.model(run.label)
        compressing = _compress(model_folder, run.recipe, tools)
    # The server ends before the model is loaded, because it reserves most of the device.
    served = _served(tools, model_folder, run.label)
    model, tokenizer = tools.load(model_folder)
    record_path = model_folder / RUN_RECORD_NAME
    record = read_json(record_path, "remove the checkpoint") if record_path.exists() else {}
    reference = folder.row(DENSE)
    if reference is None:
        figures, traces = measure_dense(model, tokenizer, held_out)
    else:
        dense, _ = tools.load(tools.source)
        of_dense = (reference, folder.traces(DENSE))
        figures, traces = measure(run.label, model, dense, tokenizer, held_out, of_dense)
    row = {
        **{key: getattr(run, key) for key in ("label", "row", "group", "seed", "recipe")},
        **figures,
        "bytes": checkpoint_bytes(model_folder),
        "served": served,
        "compressing": compressing,
        # which experts REAPPruningModifier has kept, and their saliency, by layer
        "experts_removed": record.get("experts_removed"),
    }
    folder.add(without_paths(row), traces)
    words = [f"{run.label}: {row['bytes']['total'] / 1e6:,.2f} MB"]
    if divergence := row["divergence"]:
        words.append(f"KL {divergence['kl']:.3f}, top-1 {divergence['agreement']:.1%}")
    if row["accuracy"]:
        words.append(f"accuracy {row['accuracy']['accuracy']:.1%}")
    logger.info(", ".join(words))


def _compress(model_folder: Path, recipe: dict[str, Any], tools: Tools) -> float | None:
    """Write the checkpoint of a row under its name when it is whole; return the seconds, if any.

    One that is there has this recipe (`check_finished`).
    """
    if model_folder.exists():
        return None
    started = time.monotonic()
    new = model_folder.with_name(f"{model_folder.name}.new")
    model_folder.parent.mkdir(parents=True, exist_ok=True)
    if new.exists():
        shutil.rmtree(new)
    tools.compress(recipe, new)
    write_json_atomic(new / RECIPE_NAME, without_paths(recipe))
    os.rename(new, model_folder)
    return time.monotonic() - started


def _served(tools: Tools, model: Path, label: str) -> dict[str, Any] | None:
    """Return tokens per second of a served run, or why a compressed model cannot be served."""
    if tools.serve is None:
        return None
    gc.collect()  # the device memory of models that are gone, for the server
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    try:
        return {"tokens_per_second": tools.serve(model, label).tokens_per_second}
    except RacError as error:
        if label == DENSE:
            raise RacError(f"serve: true, and the dense model cannot be served: {error}") from error
        logger.warning(f"{label}: not served ({error})")
        return {"not_measured": str(error)}
