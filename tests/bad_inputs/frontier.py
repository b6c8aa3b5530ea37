"""Mistakes about `rac eval`, `rac frontier` and `rac report`."""

from pathlib import Path
from typing import Any

import yaml

from tests.bad_inputs.bench import Bench, Case, Cases
from tests.frontier.sample import write_sample
from tests.tiny import NAME

CASES = Cases()
GOOD = {"label": "good", "recipe": {NAME: {"sparsity": 0.5}}}


def frontier(b: Bench, *rows: dict[str, Any], **parts: Any) -> None:
    path = b.tmp / "grid.yaml"
    path.write_text(yaml.safe_dump({"rows": [GOOD, *rows], **parts}, sort_keys=False))
    b.rac("frontier", b.folder, "--recipe-grid", path, "--out", b.tmp / "out")


def changed(b: Bench, name: str, old: str, new: str) -> Path:
    """A folder of results with another text in one of its files."""
    path = write_sample(b.tmp / "sample") / name
    path.write_text(path.read_text().replace(old, new))
    return path.parent


CASES += [
    Case(
        "a grid whose rows ask with different prompts",
        "set template, system_prompt and thinking under shared: traces: sampling",
        lambda b: frontier(
            b, {**GOOD, "label": "brief", "set": {"traces.sampling.system_prompt": "Be brief."}}
        ),
    ),
    Case(
        "a grid with a concurrency and no server",
        "concurrency: 9 has no effect without serve: true; leave it out",
        lambda b: frontier(b, evaluation={"concurrency": 9}),
    ),
    Case(
        "`rac report` of a damaged line",
        "line 1: no row of rac frontier",
        lambda b: b.rac(
            "report", changed(b, "rows.jsonl", '{"version"', '"version"'), "-o", "report.html"
        ),
    ),
    Case(
        "`rac eval --preset` of generated problems",
        "has no effect since source 'arithmetic' generates its problems",
        lambda b: b.rac("eval", b.folder, "--preset", "math-500", "--source", "arithmetic"),
    ),
]
