"""The page of the command lists every preset, and the command takes each."""

from pathlib import Path
from typing import get_args, get_type_hints

from rac_modifier.cli.eval import evaluate
from rac_modifier.problems.held_out import PRESETS


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
