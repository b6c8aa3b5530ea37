"""Mistakes about `rac frontier` and `rac report`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from rac_modifier import recipe
from tests.bad_inputs.bench import Bench, Case, Cases
from tests.frontier.sample import write_sample
from tests.tiny import NAME

CASES = Cases()
GOOD = {"label": "good", "recipe": {NAME: {"sparsity": 0.5}}}
GPTQ = {"scheme": "W4A16", "ignore": ["lm_head"]}
BYTES = {"targets": ["Linear"], "weights": {"num_bits": 8, "strategy": "channel"}}


def frontier(b: Bench, *rows: dict[str, Any], **parts: Any) -> None:
    path = b.tmp / "grid.yaml"
    path.write_text(yaml.safe_dump({"rows": [GOOD, *rows], **parts}, sort_keys=False))
    b.rac("frontier", b.folder, "--recipe-grid", path, "--out", b.tmp / "out")


def written(b: Bench, text: str) -> Path:
    """A grid file with this text."""
    path = b.tmp / "text.yaml"
    path.write_text(text)
    return path


def collect(b: Bench, *options: str) -> None:
    b.rac("traces", "collect", b.folder, "-r", "rac_2of4", *options)


def changed(b: Bench, name: str, old: str, new: str) -> Path:
    """A folder of results with another text in one of its files."""
    path = write_sample(b.tmp / "sample") / name
    path.write_text(path.read_text().replace(old, new))
    return path.parent


CASES += [
    Case(
        "a recipe in the place of a grid",
        "is a recipe and no grid; write a grid with rows: [{label: one, recipe: ",
        lambda b: b.rac(
            "frontier", b.folder, "--recipe-grid", recipe("rac_2of4"), "--out", b.tmp / "out"
        ),
    ),
    Case(
        "a grid whose rows ask with different prompts",
        "set template, system_prompt and thinking under shared: traces: sampling",
        lambda b: frontier(
            b, {**GOOD, "label": "brief", "set": {"traces.sampling.system_prompt": "Be brief."}}
        ),
    ),
    Case(
        "a grid with a benchmark twice",
        "benchmarks names math-500 twice; name each once",
        lambda b: frontier(
            b, evaluation={"benchmarks": [{"preset": "math-500"}, {"preset": "math-500", "cap": 9}]}
        ),
    ),
    Case(
        "a grid that is a text",
        "holds no grid but str; write it as rows:",
        lambda b: b.rac(
            "frontier", b.folder, "--recipe-grid", written(b, "hello"), "--out", b.tmp / "f"
        ),
    ),
    Case(
        "a grid with a concurrency and no server",
        "concurrency=9 is for a server; set serve: true, or set batch_size",
        lambda b: frontier(b, evaluation={"concurrency": 9}),
    ),
    Case(
        "`rac traces collect --concurrency` without a server",
        "--concurrency 9 is for --serve",
        lambda b: collect(b, "--concurrency", "9"),
    ),
    Case(
        "`rac report` of a damaged line",
        "line 1: not JSON",
        lambda b: b.rac(
            "report", changed(b, "rows.jsonl", '{"version"', '"version"'), "-o", "report.html"
        ),
    ),
]
