"""The table of presets: figures as published, and columns as the page of the command has them."""

from pathlib import Path
from typing import get_args, get_type_hints

from rac_modifier.cli.eval import evaluate
from rac_modifier.problems.held_out import PRESETS


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


def test_the_page_of_the_command_has_each_preset():
    page = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
    for name, preset in PRESETS.items():
        (row,) = [line for line in page.splitlines() if line.startswith(f"| `{name}` ")]
        assert f"`{preset.source}` ({preset.problems:,}" in row
        assert f" | {preset.samples} | " in row
        assert f"`{preset.column}`" in row
        assert f"`{preset.answer_column}`" in row


def test_the_command_takes_each_preset():
    names, _ = get_args(get_type_hints(evaluate)["preset"])
    assert get_args(names) == tuple(PRESETS)
