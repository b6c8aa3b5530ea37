"""`--help` of every command: it fits one screen, and has an example that the command itself accepts."""

from __future__ import annotations

import re
import shlex

import pytest
import typer
from typer.testing import CliRunner

from rac_modifier import cli

LINES, COLUMNS = 40, 100  # of a screen


def commands(command: typer.core.TyperCommand, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every command and group, by the words that name it."""
    children = getattr(command, "commands", {})
    return [
        path,
        *(found for name, child in children.items() for found in commands(child, (*path, name))),
    ]


ALL = commands(typer.main.get_command(cli.app))


def help_of(path: tuple[str, ...]) -> list[str]:
    result = CliRunner().invoke(cli.app, [*path, "--help"], terminal_width=COLUMNS, prog_name="rac")
    assert result.exit_code == 0
    return result.output.splitlines()


def test_the_commands_are_found() -> None:
    for path in [
        (),
        ("prune",),
        ("pack",),
        ("unpack",),
        ("doctor",),
        ("inspect",),
        ("eval",),
        ("traces", "collect"),
    ]:
        assert path in ALL


@pytest.mark.parametrize("path", ALL, ids=" ".join)
def test_help_fits_a_screen(path: tuple[str, ...]) -> None:
    lines = help_of(path)
    assert len(lines) <= LINES
    assert max(map(len, lines)) <= COLUMNS


@pytest.mark.parametrize(
    "path", [path for path in ALL if not path or path == ("traces",)], ids=" ".join
)
def test_no_command_of_a_list_is_cut_short(path: tuple[str, ...]) -> None:
    assert not [line for line in help_of(path) if line.startswith("  ") and line.endswith("...")]


@pytest.mark.parametrize("path", ALL, ids=" ".join)
def test_help_has_an_example_with_options_that_exist(path: tuple[str, ...]) -> None:
    text = re.sub(r"\n +", " ", "\n".join(help_of(path)))
    examples = re.findall(r"Example: (rac .*?)(?=\n|$| Example:)", text)
    assert examples, text
    for example in examples:
        words = shlex.split(example)[1:]
        named = max((p for p in ALL if p == tuple(words[: len(p)])), key=len)
        assert named == path or not path or path == named[: len(path)]
        whole = "\n".join(help_of(named))
        for option in (word.partition("=")[0] for word in words if word.startswith("--")):
            assert option in whole
