"""`--help` of every command, wrong use, and packages that are not installed."""

import json
import re
import shlex
import sys

import pytest
import typer
from typer.testing import CliRunner

from rac_modifier import cli

LINES, COLUMNS = 40, 100  # of a screen
ROOT = typer.main.get_command(cli.app)


def commands(command, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], object]:
    """Every command and group, by the words that name it."""
    by_path = {path: command}
    for name, child in getattr(command, "commands", {}).items():
        by_path |= commands(child, (*path, name))
    return by_path


ALL = commands(ROOT)


def help_of(path: tuple[str, ...]) -> list[str]:
    result = CliRunner().invoke(cli.app, [*path, "--help"], terminal_width=COLUMNS, prog_name="rac")
    assert result.exit_code == 0
    return result.output.splitlines()


def test_twelve_commands_are_enough():
    assert len(ROOT.commands) <= 12


@pytest.mark.parametrize("path", ALL, ids=" ".join)
def test_help_fits_a_screen_and_has_an_example_with_options_that_exist(path):
    lines = help_of(path)
    assert len(lines) <= LINES
    assert max(map(len, lines)) <= COLUMNS
    if hasattr(ALL[path], "commands"):
        assert not [line for line in lines if line.startswith("  ") and line.endswith("...")]
    for parameter in ALL[path].params:
        assert parameter.name == "help" or parameter.help, parameter.name
    text = re.sub(r"\n +", " ", "\n".join(lines))
    examples = re.findall(r"Example: (rac .*?)(?=\n|$| Example:)", text)
    assert examples, text
    for example in examples:
        words = shlex.split(example)[1:]
        named = max((p for p in ALL if p == tuple(words[: len(p)])), key=len)
        assert path == named[: len(path)]
        whole = "\n".join(help_of(named))
        for option in (word.partition("=")[0] for word in words if word.startswith("--")):
            assert option in whole


@pytest.mark.slow
def test_the_embedded_reasoner_end_to_end(rac, recipe_file, tmp_path):
    """The README's commands, small: the pruned reasoner still reasons."""
    out, results = tmp_path / "out", tmp_path / "eval.json"
    options = ["-r", recipe_file, "-s", f"traces.store={tmp_path / 's.jsonl'}",
               "-s", "calibration.tokens=8192", "-s", "traces.sampling.max_new_tokens=512",
               "-s", "calibration.batch_tokens=4096", "--precision", "float32"]  # fmt: skip
    assert rac("prune", "reasoner", out, *options)[0] == 0
    asked = ("--problems", 24, "--cap", 512, "--precision", "float32", "--json", results)
    assert rac("eval", out, *asked)[0] == 0
    assert json.loads(results.read_text())["results"][0]["accuracy"] > 0.6


def test_a_package_that_is_not_installed_is_one_message(rac, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for name in [name for name in sys.modules if name.startswith("rac_modifier.checkpoint.")]:
        monkeypatch.delitem(sys.modules, name)
    code, out, err = rac("unpack", tmp_path, tmp_path / "out")
    assert (code, out) == (1, "")
    assert err == (
        "error: this command needs huggingface_hub; rac doctor shows which extra installs it\n"
    )
    monkeypatch.setitem(sys.modules, "rac_modifier.checkpoint.output_folder", None)
    with pytest.raises(ModuleNotFoundError):
        rac("unpack", tmp_path, tmp_path / "out")
