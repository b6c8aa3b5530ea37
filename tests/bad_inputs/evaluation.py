"""Mistakes about `rac eval`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tests.bad_inputs.bench import Bench, Case, Cases

CASES = Cases()


def calibrated(b: Bench, name: str, **prompt: Any) -> Path:
    """A copy of the tiny model, with a run record that it was calibrated with this prompt."""
    folder = b.tmp / name
    shutil.copytree(b.folder, folder)
    settings = {"template": "chat", "system_prompt": None, "thinking": True, **prompt}
    (folder / "rac_run.json").write_text(json.dumps({"prompts": {"traces": settings}}))
    return folder


def copy_of(b: Bench, *rows: dict[str, Any]) -> Path:
    """A user's copy of a benchmark."""
    path = b.tmp / "copy.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


CASES += [
    Case(
        "`rac eval --preset` of generated problems",
        "which generates problems of its own",
        lambda b: b.rac("eval", b.folder, "--preset", "math-500", "--source", "arithmetic"),
    ),
    Case(
        "`rac eval --preset` with a copy that lacks a column",
        "has no column 'answer'",
        lambda b: b.rac(
            "eval", b.folder, "--preset", "math-500", "--source", copy_of(b, {"problem": "1 + 1?"})
        ),
    ),
    Case(
        "`rac eval --top-p` above 1",
        "is not a share of the probability",
        lambda b: b.rac("eval", b.folder, "--temperature", "1", "--top-p", "1.5"),
    ),
    Case(
        "`rac eval --serve --server URL`",
        "names one; leave one of them out",
        lambda b: b.rac("eval", b.folder, "--serve", "--server", "http://127.0.0.1:8000"),
    ),
]
