import json
import sys

import pytest
from typer.testing import CliRunner

from rac_modifier import cli

COMMANDS = [(), ("traces",), ("traces", "collect"), ("traces", "inspect"), ("traces", "export"), ("prune",), ("recover",),
            ("eval",), ("inspect",), ("schema",), ("recipes",), ("recipes", "show")]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help(command):
    result = CliRunner().invoke(cli.app, [*command, "--help"], terminal_width=120)
    assert result.exit_code == 0
    assert "Usage:" in result.output


def test_every_option_and_argument_explains_itself():
    import typer

    def walk(command):
        for parameter in command.params:
            if parameter.name != "help":
                yield command.name, parameter
        for child in getattr(command, "commands", {}).values():
            yield from walk(child)

    parameters = list(walk(typer.main.get_command(cli.app)))
    assert len(parameters) > 15
    assert [(command, p.name) for command, p in parameters if not getattr(p, "help", None)] == []


@pytest.mark.parametrize(
    "args",
    [
        ("eval", "x", "--problems", "0"),
        ("eval", "x", "--precision", "fp99"),
        ("eval", "x", "--cap", "-1"),
        ("prune",),
    ],
    ids=" ".join,
)
def test_what_typer_refuses(rac, args):
    assert rac(*args)[0] == 2


@pytest.mark.slow
def test_the_embedded_reasoner_end_to_end(rac, recipe_file, tmp_path):
    """The README's commands, small: the pruned reasoner still reasons."""
    out = tmp_path / "out"
    options = ["-r", recipe_file, "-s", f"traces.store={tmp_path / 's.jsonl'}", "-s", "calibration.tokens=8192",
               "-s", "traces.sampling.max_new_tokens=512", "-s", "calibration.batch_tokens=4096"]  # fmt: skip
    assert rac("prune", "reasoner", out, *options, "--precision", "float32")[0] == 0
    results = tmp_path / "eval.json"
    code, _, _ = rac(
        "eval", out, "--problems", 24, "--cap", 512, "--precision", "float32", "--json", results
    )
    assert code == 0
    assert json.loads(results.read_text())["results"][0]["accuracy"] > 0.6


def test_a_package_that_is_not_installed_is_one_message(rac, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for name in [name for name in sys.modules if name.startswith("rac_modifier.checkpoint.")]:
        monkeypatch.delitem(sys.modules, name)
    code, out, err = rac("unpack", tmp_path, tmp_path / "out")
    assert (code, out) == (1, "")
    assert (
        err
        == "error: this command needs huggingface_hub, which is not installed; rac doctor shows which extra installs it\n"
    )


def test_a_module_of_ours_that_is_missing_is_no_message(rac, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "rac_modifier.checkpoint.convert", None)
    with pytest.raises(ModuleNotFoundError):
        rac("unpack", tmp_path, tmp_path / "out")
