"""The table of presets: names, figures and data sets as published, and columns that a published row has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rac_modifier.errors import RacError
from rac_modifier.evaluation.presets import PRESETS, preset_of
from rac_modifier.problems.held_out import benchmark_problems
from rac_modifier.settings.problems import ProblemSource

# A row of each dataset, invented, with all columns that the published one has (of GPQA, which has 65, a few).
ROWS = {
    "aime24": {
        "id": 60, "problem": "Find $n$.", "solution": "So $n = 25$.", "answer": "025", "url": "https://example.com",
        "year": "2024",
    },
    "aime25": {
        "problem": "Find $n$.", "answer": "70", "solution": "So 70.", "url": "https://example.com", "year": "2025", "id": 0,
    },
    "gpqa-diamond": {
        "Question": "Which is the lightest?", "Correct Answer": "H\n", "Incorrect Answer 1": "He", "Incorrect Answer 2": "Li",
        "Incorrect Answer 3": "Be", "Subdomain": "Chemistry (general)", "High-level domain": "Chemistry", "Record ID": "rec0",
    },
    "gsm8k": {"question": "Two and two?", "answer": "2 + 2 = <<2+2=4>>4\n#### 4"},
    "math-500": {
        "problem": "Halve $1$.", "solution": r"$\boxed{\frac{1}{2}}$", "answer": r"\frac{1}{2}", "subject": "Algebra",
        "level": 1, "unique_id": "test/algebra/1.json",
    },
}  # fmt: skip


def test_the_figures_are_those_of_the_protocol():
    figures = {
        name: (p.problems, p.samples, p.temperature, p.top_p, p.cap) for name, p in PRESETS.items()
    }
    assert figures == {
        "aime24": (30, 64, 0.6, 0.95, 32768),
        "aime25": (30, 64, 0.6, 0.95, 32768),
        "gpqa-diamond": (198, 8, 0.6, 0.95, 32768),
        "gsm8k": (1319, 1, 0.6, 0.95, 32768),
        "math-500": (500, 4, 0.6, 0.95, 32768),
    }


@pytest.mark.parametrize("name", PRESETS)
def test_a_published_row_becomes_a_problem(name, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS[name]) + "\n")
    (problem,) = benchmark_problems(
        ProblemSource(source=str(tmp_path / "rows.jsonl")), PRESETS[name].layout, 0
    )
    assert problem.task == name
    assert r"within \boxed{}." in problem.question
    if name == "gpqa-diamond":
        assert f"{problem.answer}) H\n" in problem.question
    else:
        assert (
            problem.answer
            == {"aime24": "025", "aime25": "70", "gsm8k": "4", "math-500": r"\frac{1}{2}"}[name]
        )


def test_the_page_of_the_command_has_each_preset():
    page = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
    for name, preset in PRESETS.items():
        (row,) = [line for line in page.splitlines() if line.startswith(f"| `{name}` ")]
        assert f"`{preset.source}` ({preset.problems:,}" in row
        assert f" | {preset.samples} | " in row
        assert f"`{preset.layout.column}`" in row
        assert f"`{preset.layout.answer_column}`" in row


def test_an_unknown_name():
    with pytest.raises(
        RacError,
        match="no preset 'math500'; use one of aime24, aime25, gpqa-diamond, gsm8k, math-500",
    ):
        preset_of("math500")
