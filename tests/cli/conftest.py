"""The command as the shell runs it, a recipe for the tiny model, and the tiny model pruned by
it."""

import sys
from collections.abc import Callable
from pathlib import Path

import llmcompressor  # noqa: F401 - its log goes to the stderr of now; a test's own is closed when the test ends
import pytest

from rac_modifier import cli
from tests.tiny import entry, recipe

Rac = Callable[..., tuple[int, str, str]]


@pytest.fixture
def rac(monkeypatch, capsys, tmp_path) -> Rac:
    """Run the command in an empty folder: exit code, standard output, standard error."""
    monkeypatch.chdir(tmp_path)

    def rac(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["rac", *map(str, args)])
        capsys.readouterr()  # what the test itself printed before
        code: int = 0
        try:
            cli.main()
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        output = capsys.readouterr()
        return code, output.out, output.err

    return rac


@pytest.fixture
def recipe_file(trace_store, tmp_path) -> Path:
    (tmp_path / "recipe.yaml").write_text(recipe(entry(trace_store)))
    return tmp_path / "recipe.yaml"


@pytest.fixture(scope="session")
def sparse_folder(tiny_folder, trace_store, tmp_path_factory) -> Path:
    """The tiny model pruned to 2:4 by `rac prune`, packed; not to be written to."""
    folder = tmp_path_factory.mktemp("sparse")
    (folder / "recipe.yaml").write_text(recipe(entry(trace_store)))
    args = ["prune", tiny_folder, folder / "out", "-r", folder / "recipe.yaml"]
    args += ["-s", "calibration.tokens=500"]
    cli.app([str(arg) for arg in args], standalone_mode=False)
    return folder / "out"
