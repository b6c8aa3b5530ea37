"""A grid of recipes, row by row: compressed, measured, written. Finished rows are not run again."""

from __future__ import annotations

import gc
import os
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from loguru import logger

from rac_modifier.checkpoint.record import RUN_RECORD_NAME
from rac_modifier.errors import RacError
from rac_modifier.evaluation.results import EvalResult
from rac_modifier.files import read_json, remove_folder, without_paths
from rac_modifier.frontier.benchmarks import (
    Ask,
    Benchmark,
    Servers,
    ask_benchmarks,
    check_benchmarks,
    missing_benchmarks,
)
from rac_modifier.frontier.folder import FrontierFolder
from rac_modifier.frontier.measure import (
    HeldOut,
    Measured,
    checkpoint_bytes,
    layers_of,
    measure,
    measure_dense,
)
from rac_modifier.settings.grid import DENSE, PlannedRow

_LAST_LINES = 3  # of a long reason that are kept in a row; the log has all


@dataclass(frozen=True)
class Tools:
    """What a row needs of other libraries.

    Attributes:
        source: the folder of the dense model.
        load: from a model folder to the model in memory and its tokenizer.
        compress: applies a recipe to the dense model, and saves the result to a folder.
        servers: who answers for a model folder, inside the context: this process, or a server.
        serve: evaluates a served model folder for its tokens per second; None: not asked for.
        benchmarks: what each model is asked besides.
        ask: asks it.
    """

    source: Path
    load: Callable[[Path], tuple[Any, Any]]
    compress: Callable[[dict[str, Any], Path], None]
    servers: Callable[[Path], AbstractContextManager[Servers]] = lambda _: nullcontext(
        lambda: nullcontext(())
    )
    serve: Callable[[Path, str, Servers], EvalResult] | None = None
    benchmarks: Sequence[Benchmark] = ()
    ask: Ask | None = None


def check_finished(folder: FrontierFolder, planned: Sequence[PlannedRow]) -> None:
    """Refuse a grid in which a finished row has another recipe now.

    Raises:
        RacError: naming the rows.
    """
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


def run_grid(
    folder: FrontierFolder,
    planned: Sequence[PlannedRow],
    held_out: HeldOut,
    tools: Tools,
    *,
    remove_models: bool = False,
    report: Callable[[dict[str, Any]], None] = lambda row: None,
) -> None:
    """Run and measure every row that is not finished, the dense model first.

    Args:
        folder: open for writing.
        planned: the runs, all checked.
        held_out: problems and sampling.
        tools: see there.
        remove_models: remove each checkpoint when it is measured.
        report: called with each new row.

    Raises:
        RacError: what compressing and measuring raise; benchmarks that could not be measured,
            when all else is done. Finished rows stay.
    """
    check_finished(folder, planned)
    check_benchmarks(folder, tools.benchmarks)
    _check_models(folder, planned, tools)
    failed: dict[str, str] = {}
    new = folder.row(DENSE) is None
    with tools.servers(tools.source) as servers:
        # First, because what stops the server would stop every row. The server ends before the
        # model is loaded, because it reserves most of the device.
        served = _served(tools, tools.source, DENSE, servers) if new else None
        _benchmarks(folder, DENSE, tools.source, tools, servers, failed)
    if new:
        _finish_dense(folder, held_out, tools, served)
        report(folder.rows[-1])
    for number, run in enumerate(planned, 1):
        new, model = folder.row(run.label) is None, folder.model(run.label)
        with tools.servers(model) as servers:
            if new:
                logger.info(f"{run.label}: row {number} of {len(planned)}")
                _finish(folder, run, held_out, tools, servers)
                report(folder.rows[-1])
            measured = _benchmarks(folder, run.label, model, tools, servers, failed)
        if (new or measured) and remove_models and run.label not in failed:
            remove_folder(model)
    if failed:
        reasons = "".join(f"\n- {label}: {reason}" for label, reason in failed.items())
        raise RacError(
            f"the rows are in {folder.folder}, but not all benchmarks; run the same command again "
            f"to go on with them{reasons}"
        )


def _check_models(folder: FrontierFolder, planned: Sequence[PlannedRow], tools: Tools) -> None:
    """Refuse benchmarks of finished rows whose checkpoints were removed."""
    gone = [
        run.label
        for run in planned
        if folder.row(run.label) is not None
        and missing_benchmarks(folder, run.label, tools.benchmarks)
        and not folder.model(run.label).is_dir()
    ]
    if gone:
        raise RacError(
            f"{folder.folder} has no checkpoint any more of {', '.join(gone)}, so the benchmarks "
            "cannot be asked; leave them out, or name another folder"
        )


def _benchmarks(
    folder: FrontierFolder,
    label: str,
    model: Path,
    tools: Tools,
    servers: Servers,
    failed: dict[str, str],
) -> bool:
    """Ask missing benchmarks; return whether any was missing. `failed` gets the failures."""
    if tools.ask is None or not missing_benchmarks(folder, label, tools.benchmarks):
        return False
    _free_accelerator()
    if reason := ask_benchmarks(folder, label, model, tools.benchmarks, tools.ask, servers):
        failed[label] = reason
    return True


def _free_accelerator() -> None:
    """Free the device memory of models that are gone, for a server on the same device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _finish_dense(
    folder: FrontierFolder, held_out: HeldOut, tools: Tools, served: dict[str, Any] | None
) -> None:
    """Measure the dense model, and write its row."""
    started = time.monotonic()
    model, tokenizer = tools.load(tools.source)
    measured = measure_dense(model, tokenizer, held_out)
    row = {
        **dict.fromkeys(("label", "row", "group"), DENSE),
        **dict.fromkeys(("seed", "recipe", "compressing")),
        **measured.figures,
        "bytes": checkpoint_bytes(tools.source),
        "layers": {},
        "served": served,
        "seconds": time.monotonic() - started,
    }
    folder.add(without_paths(row), measured.traces)


def _finish(
    folder: FrontierFolder, run: PlannedRow, held_out: HeldOut, tools: Tools, servers: Servers
) -> None:
    """Compress and measure a model, and write its row."""
    started = time.monotonic()
    model_folder = folder.model(run.label)
    compressing = _compress(model_folder, run.recipe, tools)
    model, tokenizer = tools.load(model_folder)
    dense, _ = tools.load(tools.source)
    dense_row = folder.row(DENSE)
    assert dense_row is not None
    reference = Measured(dense_row, folder.traces(DENSE))
    measured = measure(run.label, model, dense, tokenizer, held_out, reference)
    del model, dense
    path = model_folder / RUN_RECORD_NAME
    record = read_json(path) if path.is_file() else {}  # upstream's modifiers alone write none
    row = {
        **{key: getattr(run, key) for key in ("label", "row", "group", "seed", "recipe")},
        **measured.figures,
        "bytes": checkpoint_bytes(model_folder),
        "layers": layers_of(record),
        "calibration": record.get("calibration"),
        "served": _served(tools, model_folder, run.label, servers),
        "compressing": compressing,
        "seconds": time.monotonic() - started,
    }
    folder.add(without_paths(row), measured.traces)


def _compress(model_folder: Path, recipe: dict[str, Any], tools: Tools) -> float | None:
    """Write the checkpoint of a row; return the seconds, None if it was there.

    It gets its name when it is whole. The groups that a killed run has pruned are stored apart,
    and compressing goes on from them.
    """
    if model_folder.exists():
        return None
    started = time.monotonic()
    new = model_folder.with_name(f"{model_folder.name}.new")
    model_folder.parent.mkdir(parents=True, exist_ok=True)
    if new.exists():
        shutil.rmtree(new)
    tools.compress(recipe, new)
    os.rename(new, model_folder)
    return time.monotonic() - started


def _served(tools: Tools, model: Path, label: str, servers: Servers) -> dict[str, Any] | None:
    """Return speed and accuracy of a served run, or why a compressed model cannot be served."""
    if tools.serve is None:
        return None
    _free_accelerator()
    try:
        values = tools.serve(model, label, servers).as_dict()
    except RacError as error:
        if label == DENSE:
            raise RacError(f"serve: true, and the dense model cannot be served: {error}") from error
        logger.warning(f"{label}: not served ({error})")
        first, *lines = str(error).splitlines()
        return {"not_measured": "\n".join([first, *lines[-_LAST_LINES:]])}
    names = ("tokens_per_second", "accuracy", "ci_low", "ci_high", "seconds")
    return {name: values[name] for name in names}
