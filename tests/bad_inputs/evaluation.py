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
        "`rac eval --divergence` of one model",
        "name at least two models",
        lambda b: b.rac("eval", b.folder, "--divergence"),
    ),
    Case(
        "`rac eval --thinking` without a template",
        "--thinking and --no-thinking are for a chat template",
        lambda b: b.rac("eval", b.folder, "--template", "none", "--thinking"),
    ),
    Case(
        "`rac eval --concurrency` without a server",
        "--concurrency 9 is for --server and --serve; leave it out, or set --batch-size",
        lambda b: b.rac("eval", b.folder, "--concurrency", "9"),
    ),
    Case(
        "`rac eval --served-as` without a server",
        "--served-as m is for --server; leave it out",
        lambda b: b.rac("eval", b.folder, "--served-as", "m"),
    ),
    Case(
        "`rac eval --column` with problems that are generated",
        "column='text' does not apply: source 'arithmetic' generates its problems; leave column out",
        lambda b: b.rac("eval", b.folder, "--column", "text"),
    ),
    Case(
        "`rac eval --plot` to another kind of file",
        "use a name that ends in .png, .svg, .pdf",
        lambda b: b.rac("eval", b.folder, "--plot", "plot.txt"),
    ),
    Case(
        "`rac eval --json` into a folder that is not there",
        "its folder does not exist; create it first",
        lambda b: b.rac("eval", b.folder, "--json", "no/results.json"),
    ),
    Case(
        "`rac eval --card` of a model that is not ours",
        "is not the folder of a model that rac wrote",
        lambda b: b.rac("eval", b.folder, "--card"),
    ),
    Case(
        "`rac eval --baseline` of a file that is not there",
        "no.json: cannot be read as JSON (No such file or directory); write it with: rac eval DENSE --json FILE",
        lambda b: b.rac("eval", b.folder, "--baseline", "no.json"),
    ),
    Case(
        "a system prompt for the bare question",
        "has no place without a chat template",
        lambda b: b.rac("eval", b.folder, "--template", "none", "--system-prompt", "Be brief."),
    ),
    Case(
        "evaluating models that were calibrated with different prompts",
        "calibrated with different prompts, and all models must be asked with one",
        lambda b: b.rac("eval", calibrated(b, "on"), calibrated(b, "off", thinking=False)),
    ),
    Case(
        "evaluating a model with a damaged run record",
        "its prompt settings cannot be read",
        lambda b: b.rac("eval", calibrated(b, "damaged", template="jinja")),
    ),
    Case(
        "`rac eval --preset` of a name that is not there",
        "use one of aime24, aime25, gpqa-diamond, gsm8k, math-500",
        lambda b: b.rac("eval", b.folder, "--preset", "math500"),
    ),
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
        "`rac eval --preset` with a row without an answer",
        "column 'answer' holds nothing; complete the row",
        lambda b: b.rac(
            "eval",
            b.folder,
            "--preset",
            "aime24",
            "--source",
            copy_of(b, {"problem": "1 + 1?", "answer": " "}),
        ),
    ),
    Case(
        "`rac eval --preset --divergence`",
        "compares whole answers by accuracy; leave it or --divergence out",
        lambda b: b.rac("eval", b.folder, b.folder, "--divergence", "--preset", "gsm8k"),
    ),
    Case(
        "`rac eval --top-p` of greedy answers",
        "has no effect on greedy answers",
        lambda b: b.rac("eval", b.folder, "--top-p", "0.9"),
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


@CASES.case("`rac eval --serve` with a vllm that is not there", "is no command that can be run")
def _(b: Bench) -> None:
    b.monkeypatch.setenv("RAC_VLLM", "/no/vllm")
    b.rac("eval", b.folder, "--serve")


@CASES.case(
    "`rac eval --serve` with a vllm that does not start", "vllm serve stopped with exit code 1"
)
def _(b: Bench) -> None:
    b.monkeypatch.setenv("RAC_VLLM", "false")
    b.rac("eval", b.folder, "--serve", "--problems", "2")
