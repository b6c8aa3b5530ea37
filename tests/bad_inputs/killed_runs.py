"""Mistakes about a run that goes on after a kill, and about what is kept for it."""

from __future__ import annotations

import torch

from tests.bad_inputs.bench import Bench, Case, Cases

CASES = Cases()


def _killed(b: Bench, about: dict[str, object], calibrated: dict[str, object]) -> None:
    """A group of a run that was killed, in a folder; and the start of a run that would go on from there."""

    from rac_modifier.llmcompressor import resume

    b.monkeypatch.setattr(resume, "_SAVE_SECONDS", 0.0)
    first = resume.FinishedGroups(b.tmp / "out.unfinished", ABOUT)
    first.begin(CALIBRATED)
    first.add({"m": torch.nn.Linear(2, 2)}, {"m": {}}, {})
    resume.FinishedGroups(b.tmp / "out.unfinished", {**ABOUT, **about}).begin(
        {**CALIBRATED, **calibrated}
    )


ABOUT = {"recipe": {"sparsity": 0.5}, "model": "f" * 64, "made with": {"torch": "2.9.0"}}
CALIBRATED = {"calibration set": "a" * 64, "trace stores": {"traces: t.jsonl": "sha256 aa"}}

CASES += [
    Case(
        "a killed run that goes on with another recipe",
        "holds what a run with another recipe has pruned (sparsity: 0.5 there, 0.6 here); start that run again to go on with it",
        lambda b: _killed(b, {"recipe": {"sparsity": 0.6}}, {}),
    ),
    Case(
        "a killed run that goes on with another model",
        "holds what a run with another model has pruned; start that run again to go on with it",
        lambda b: _killed(b, {"model": "e" * 64}, {}),
    ),
    Case(
        "a killed run that goes on with another trace store",
        "has pruned, since a trace store is another one (traces: t.jsonl sha256 aa, now sha256 bb)",
        lambda b: _killed(
            b, {}, {"calibration set": "b" * 64, "trace stores": {"traces: t.jsonl": "sha256 bb"}}
        ),
    ),
    Case(
        "a killed run that goes on with another version of torch",
        "that was begun with torch 2.9.0, now 2.10.0, and would not end with the same bits: use the same",
        lambda b: _killed(b, {"made with": {"torch": "2.10.0"}}, {}),
    ),
]


@CASES.case(
    "a damaged file of what a killed run has pruned", "group-00000.safetensors: cannot be read"
)
def _(b: Bench) -> None:
    _killed(b, {}, {})
    (b.tmp / "out.unfinished" / "group-00000.safetensors").write_bytes(b"half")
    _killed(b, {}, {})


@CASES.case(
    "an output folder beside which nothing can be written", "is not a folder that can be written to"
)
def _(b: Bench) -> None:
    (b.tmp / "out.unfinished").write_text("a file")
    b.rac_prune()
