"""Shared by the suites: the result file, the machine, runs in turn, processes of their own."""

import argparse
import json
import multiprocessing
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
RAC = [sys.executable, "-c", "from rac_modifier.cli import main; main()"]

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "WARNING")


def machine() -> str:
    """Return the processor's name, its vector extensions, and the number of cores."""
    name, flags = platform.processor() or platform.machine(), ""
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line.partition(":") for line in info.read_text().splitlines()]
        values = {key.strip(): value.strip() for key, _, value in lines}
        name = values.get("model name", name)
        present = set(values.get("flags", "").split())
        flags = ", ".join(
            flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in present
        )
    return f"{name} ({flags}), {len(os.sched_getaffinity(0))} cores"


def commit() -> str:
    """Return the commit's short hash, "+" for changed files; "unknown" outside of git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--exclude", "*", "--dirty=+"]
    process = subprocess.run(command, capture_output=True, text=True)
    return process.stdout.strip() or "unknown"


def save(
    folder: Path,
    name: str,
    model: str,
    columns: Mapping[str, str],
    rows: Sequence[Sequence[Any]],
    gaps: Mapping[str, str] | None = None,
) -> Path:
    """Write `folder/name.json`, which `bench.render` turns into a table.

    `columns` has the name of each column, and the format of its cells, such as ".2f". `gaps` has
    the reasons why contenders are missing.
    """
    about = {
        "model": model,
        "machine": machine(),
        "date": date.today().isoformat(),
        "commit": commit(),
        "command": "python -m bench " + shlex.join(sys.argv[1:]),
        **({"gaps": dict(gaps)} if gaps else {}),
        "columns": dict(columns),
        "rows": "ROWS",
    }
    lines = ",\n".join("  " + json.dumps(row, ensure_ascii=False) for row in rows)
    text = json.dumps(about, indent=1, ensure_ascii=False).replace('"ROWS"', f"[\n{lines}\n ]")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(text + "\n", encoding="utf-8")
    print(f"wrote {path}", flush=True)
    return path


def spread(values: Sequence[float]) -> list[float] | float:
    """Return the median with the lowest and highest value; a single value as it is."""
    if len(values) == 1:
        return values[0]
    return [statistics.median(values), min(values), max(values)]


def ratios(values: Sequence[float], base: Sequence[float]) -> list[float] | float:
    """Return the spread of values over those of the first contender in the same rounds."""
    return spread([value / of_base for value, of_base in zip(values, base, strict=False)])


def in_turn(
    runs: Mapping[str, Callable[[], Any]], rounds: int, gaps: dict[str, str] | None = None
) -> dict[str, list[Any]]:
    """Run each contender once per round, every second round reversed; return results by name.

    A contender that fails is reported and not run again; it has the results of the rounds before.
    `gaps` gets the reason.
    """
    results: dict[str, list[Any]] = {name: [] for name in runs}
    failed = {} if gaps is None else gaps
    for turn in range(rounds):
        for name in list(runs)[:: 1 if turn % 2 == 0 else -1]:
            if name in failed:
                continue
            started = time.monotonic()
            try:
                results[name].append(runs[name]())
            except (Exception, SystemExit) as error:  # one must not end hours of work
                failed[name] = f"{type(error).__name__}: {error}".removeprefix("SystemExit: ")
                print(f"{name} failed: {failed[name]}", file=sys.stderr, flush=True)
                continue
            print(f"round {turn + 1}: {name}, {time.monotonic() - started:.0f} s", flush=True)
    return {name: values for name, values in results.items() if values}


def called_in_child(function: Callable[..., Any], *values: Any) -> Any:
    """Call a function of a module with `values` in a new process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *values).result()


def add_common(parser: argparse.ArgumentParser) -> None:
    """Add the options that every suite has."""
    parser.add_argument("--work", type=Path, default=Path("build/bench"), help="models and logs")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--tiny", action="store_true", help="a check of the suite, no measurement")
