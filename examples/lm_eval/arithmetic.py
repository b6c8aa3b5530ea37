"""The problems of rac_arithmetic.yaml; equal numbers and seeds give `rac eval`'s problems."""

from __future__ import annotations

from typing import Any

from datasets import Dataset

from rac_modifier.problems.held_out import held_out_problems


def problems(count: int = 200, seed: int = 0, **unused: Any) -> dict[str, Dataset]:
    """Return the split "test"; `--metadata '{"count": 50}'` gives `count` and `seed`."""
    rows = [
        {"question": p.question, "answer": p.answer}
        for p in held_out_problems("arithmetic", count, seed)
    ]
    return {"test": Dataset.from_list(rows)}
