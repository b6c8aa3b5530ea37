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


CASES += [
    Case(
        "`rac eval --divergence` of one model",
        "name at least two models",
        lambda b: b.rac("eval", b.folder, "--divergence"),
    ),
    Case(
        "`rac eval --divergence --direct`",
        "give it without --direct",
        lambda b: b.rac("eval", b.folder, b.folder, "--divergence", "--direct"),
    ),
    Case(
        "`rac eval --direct` without a template",
        "use it with --template chat",
        lambda b: b.rac("eval", b.folder, "--direct", "--template", "none"),
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
        "`rac eval --card --direct`",
        "leave out --card or --direct",
        lambda b: b.rac("eval", b.folder, "--card", "--direct"),
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
]
