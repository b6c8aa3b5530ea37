"""Published benchmarks of a frontier's models: each result is kept when it is there, beside the rows and apart from them."""

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

    Attributes:
        name: of the preset.
        asked: problems, answers per problem and sampling, as plain values; results are compared only where it is equal.
    """

    name: str
    asked: dict[str, Any]


Servers = Callable[[], AbstractContextManager[tuple[str, ...]]]
"""Addresses of the servers of a model, inside the context; none where this process answers."""

Ask = Callable[[Path, str, Sequence[Benchmark], Servers], Iterator[tuple[Benchmark, EvalResult]]]
"""A model folder, the label of its row, the benchmarks and who answers: their results, each as soon as it is there."""


def check_benchmarks(folder: FrontierFolder, benchmarks: Sequence[Benchmark]) -> None:
    """Refuse benchmarks whose results in this folder were asked otherwise.

    Raises:
        RacError: naming the benchmark and what differs.
    """
    for benchmark in benchmarks:
        for found in (each for each in folder.benchmarks if each["benchmark"] == benchmark.name):
            old = found["asked"]
            if changed := [
                key
                for key in {**benchmark.asked, **old}
                if old.get(key) != benchmark.asked.get(key)
            ]:
                raise RacError(
                    f"{folder.folder} has results of {benchmark.name} that were asked with another {', '.join(sorted(changed))}; "
                    "set it as it was, or name another folder"
                )


def missing_benchmarks(
    folder: FrontierFolder, label: str, benchmarks: Sequence[Benchmark]
) -> list[Benchmark]:
    """Those that the row of this label has no result of."""
    return [
        benchmark for benchmark in benchmarks if folder.benchmark(label, benchmark.name) is None
    ]


def ask_benchmarks(
    folder: FrontierFolder,
    label: str,
    model: Path,
    benchmarks: Sequence[Benchmark],
    ask: Ask,
    servers: Servers,
) -> str | None:
    """Ask a model the benchmarks that its row has no result of, and keep each result.

    Returns:
        why some could not be measured; None where all are there.
    """
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
