"""Published benchmarks of a frontier's models: each result is kept as it arrives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loguru import logger

from rac_modifier.errors import RacError
from rac_modifier.evaluation.results import EvalResult
from rac_modifier.frontier.folder import FrontierFolder


@dataclass(frozen=True)
class Benchmark:
    """A benchmark that every model is asked.

    asked: problems, answers per problem and sampling, as plain values. Only results with equal
    values are compared.
    """

    name: str  # of the preset
    asked: dict[str, Any]


# Addresses of a model's servers, inside the context; none if this process answers.
Servers = Callable[[], AbstractContextManager[tuple[str, ...]]]
# Model folder, label of its row, benchmarks and who answers: the results as they arrive.
Ask = Callable[[Path, str, Sequence[Benchmark], Servers], Iterator[tuple[Benchmark, EvalResult]]]


def check_benchmarks(folder: FrontierFolder, benchmarks: Sequence[Benchmark]) -> None:
    """Refuse benchmarks whose results in this folder were asked otherwise.

    Raises:
        RacError: naming the benchmark and what differs.
    """
    for benchmark in benchmarks:
        for result in folder.benchmarks:
            old, new = result["asked"], benchmark.asked
            changed = sorted(key for key in {**new, **old} if old.get(key) != new.get(key))
            if result["benchmark"] == benchmark.name and changed:
                raise RacError(
                    f"{folder.folder} has results of {benchmark.name} that were asked with another "
                    f"{', '.join(changed)}; set it as it was, or name another folder"
                )


def missing_benchmarks(
    folder: FrontierFolder, label: str, benchmarks: Sequence[Benchmark]
) -> list[Benchmark]:
    """Return the benchmarks without a result for the row of this label."""
    return [b for b in benchmarks if folder.benchmark(label, b.name) is None]


def ask_benchmarks(
    folder: FrontierFolder,
    label: str,
    model: Path,
    benchmarks: Sequence[Benchmark],
    ask: Ask,
    servers: Servers,
) -> str | None:
    """Ask a model the benchmarks without a result; return why some could not be measured."""
    missing = missing_benchmarks(folder, label, benchmarks)
    if not missing:
        return None
    try:
        for benchmark, result in ask(model, label, missing, servers):
            values = {"asked": benchmark.asked, "result": {**result.as_dict(), "label": label}}
            folder.add_benchmark(label, benchmark.name, values)
            logger.info(f"{label}: {benchmark.name} {result.accuracy:.1%}")
    except RacError as error:
        logger.warning(f"{label}: not measured ({error})")
        return str(error)
    return None
