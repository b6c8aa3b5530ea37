"""The problems of rac_arithmetic.yaml, as `rac eval` asks them: the same ones for the same number
and seed."""

from __future__ import annotations

from typing import Any

from datasets import Dataset

from rac_modifier.problems.held_out import held_out_problems


def problems(count: int = 200, seed: int = 0, **unused: Any) -> dict[str, Dataset]:
    """The split "test"; `count` and `seed` are given on the command line, as `--metadata '{"count":
    50}'`."""
    rows = [
        {"question": p.question, "answer": p.answer}
        for p in held_out_problems("arithmetic", count, seed)
    ]
    return {"test": Dataset.from_list(rows)}
