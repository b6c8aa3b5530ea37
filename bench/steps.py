"""Time, peak memory and longest silence of each step of `rac prune` on a subject.

    python -m bench steps --label "W4A16 in layers 0 to 6" --tokens 8192

The recipe is a row of `bench formats`, which measures the checkpoint afterwards. A step ends with a
line of the log. A silence is the time between two lines, as they would be in a file.
"""

import argparse
import os
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import yaml

from bench.common import RAC, save
from bench.formats import FORMATS, folder_of, recipes_of
from bench.models import SUBJECTS, float32_copy

STEPS = {  # the log line that ends each
    "load the model": r" modules, ",
    "forecast the memory": r"next to the model",
    "read traces, measure the dense model": r"group by group",
    "quantize": r": ([\d,]+) of \1 modules",
    "head, KL on held-out traces": r"divergence from the dense model on",
    "choose 8-bit activations": r"activations of 8 bits|activations keep",
    "save": r"saved to",
}
COLUMNS = {
    "step": "",
    "minutes": ".1f",
    "longest silence, s": ".0f",
    "peak memory so far, GB": ".1f",
}
TINY = "--model reasoner --tokens 512 --cap 16"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this suite."""
    parser.add_argument("--model", default="qwen15b", choices=SUBJECTS)
    parser.add_argument("--label", default="int4", help="a row of bench/formats.yaml")
    parser.add_argument("--tokens", type=int, default=8192, help="of calibration")
    parser.add_argument("--cap", type=int, default=512, help="most tokens of a trace")


def run(options: argparse.Namespace) -> None:
    """Run the command, and write the table of its steps."""
    subject = float32_copy(options.model, options.work, options.cap)
    rows = yaml.safe_load(FORMATS.read_text())["rows"]
    recipe = recipes_of(subject, options.tokens, rows)[options.label]
    folder = folder_of(options, options.label)
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    command = [*RAC, "prune", subject.model, str(folder), "--recipe", str(path)]
    steps = timed(command, folder.with_suffix(".log"))
    save(options.out, f"steps_{options.model}", subject.name, COLUMNS, steps)


def timed(command: list[str], log: Path) -> list[list[Any]]:
    """Run a command, log its lines with their times, and return a row per step that it took."""
    environment = {**os.environ, "LLM_COMPRESSOR_LOG_LEVEL": "INFO"}
    started = since = last = time.monotonic()
    rows: list[list[Any]] = []
    left, silence, peak = dict(STEPS), 0.0, 0.0
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "env": environment}
    with log.open("w") as file, subprocess.Popen(command, text=True, **output) as process:
        assert process.stdout is not None
        for line in process.stdout:
            now = time.monotonic()
            silence, last, peak = max(silence, now - last), now, max(peak, peak_of(process.pid))
            file.write(f"{now - started:7.1f} {line}")
            file.flush()
            ended = [step for step, pattern in left.items() if re.search(pattern, line)]
            if ended:
                rows.append([ended[-1], (now - since) / 60, silence, peak])
                since, silence = now, 0.0
                for step in ended:
                    del left[step]
    if process.returncode:
        raise SystemExit(f"{command[3]} ended with {process.returncode}; {log} has its lines")
    return [*rows, ["all", (last - started) / 60, max(row[2] for row in rows), peak]]


def peak_of(process: int) -> float:
    """Return the peak resident memory of a process so far, in GB; 0 of one that has ended."""
    status = Path(f"/proc/{process}/status")
    text = status.read_text() if status.exists() else ""
    found = re.search(r"VmHWM:\s+(\d+) kB", text)
    return int(found[1]) * 1024 / 1e9 if found else 0.0
