"""The command as the shell runs it, a recipe for the tiny model, and the tiny model pruned by
it."""

import sys
from pathlib import Path

import llmcompressor  # noqa: F401 - its log goes to the stderr of now; a test's own is closed when the test ends
import pytest

from rac_modifier import cli
from tests.sampling import fake_vllm
from tests.sampling.fake_server import shorten_pauses
from tests.tiny import entry, recipe

# Options of `rac recover` with which the tiny model is trained in seconds.
RECOVERY = "tokens=3000 held_out_tokens=150 step_tokens=100 batch_tokens=400 learning_rate=0.001"
OPTIONS = ["--max-new-tokens", "40"]
OPTIONS += [word for setting in RECOVERY.split() for word in ("--set", setting)]


class Rac:
    """Runs the command in an empty folder."""

    def __init__(self, capsys: pytest.CaptureFixture[str]):
        self.capsys = capsys

    def __call__(self, *args: object) -> tuple[int, str, str]:
        """Exit code, standard output, standard error."""
        sys.argv = ["rac", *map(str, args)]
        self.capsys.readouterr()  # what the test itself printed before
        code: int = 0
        try:
            cli.main()
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        output = self.capsys.readouterr()
        return code, output.out, output.err

    def output(self, *args: object) -> str:
        """The standard output of a command that must succeed."""
        code, output, error = self(*args)
        assert code == 0, error
        return output


@pytest.fixture
def vllm(tmp_path, monkeypatch) -> Path:
    """A fake `vllm`, which notes its processes in the folder that this returns."""
    monkeypatch.setenv("RAC_VLLM", str(fake_vllm.install(tmp_path)))
    shorten_pauses(monkeypatch)
    return tmp_path


@pytest.fixture
def rac(monkeypatch, capsys, tmp_path) -> Rac:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)
    return Rac(capsys)


def prune(model: Path, folder: Path, settings: dict, tokens: int = 500) -> Path:
    """FOLDER/out: what `rac prune` makes of a model with an entry of these settings."""
    (folder / "recipe.yaml").write_text(recipe(settings))
    words = ["prune", model, folder / "out", "-r", folder / "recipe.yaml"]
    words += ["-s", f"calibration.tokens={tokens}"]
    cli.app([str(word) for word in words], standalone_mode=False)
    return folder / "out"


@pytest.fixture
def recipe_file(trace_store, tmp_path) -> Path:
    (tmp_path / "recipe.yaml").write_text(recipe(entry(trace_store)))
    return tmp_path / "recipe.yaml"


@pytest.fixture(scope="session")
def sparse_folder(tiny_folder, trace_store, tmp_path_factory) -> Path:
    """The tiny model pruned to 2:4 by `rac prune`, packed; not to be written to."""
    return prune(tiny_folder, tmp_path_factory.mktemp("sparse"), entry(trace_store))
