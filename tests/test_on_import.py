"""A module that is imported right after another one, each case in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture
def run(tmp_path: Path):
    """Run code where `library`, `library.part` and `extension` can be imported; each prints its name when it is run."""
    (tmp_path / "library").mkdir()
    (tmp_path / "library" / "__init__.py").write_text("print('library')\n")
    (tmp_path / "library" / "part.py").write_text("REGISTRY = {}\nprint('part')\n")
    (tmp_path / "extension.py").write_text(
        "from library import part\npart.REGISTRY['ours'] = 1\nprint('extension')\n"
    )
    (tmp_path / "failing.py").write_text("raise RuntimeError('broken extension')\n")

    def run(code: str) -> subprocess.CompletedProcess[str]:
        head = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        code = f"{head}from rac_modifier import _import_after as import_after\n{code}"
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    return run


def lines(done: subprocess.CompletedProcess[str]) -> list[str]:
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_before_the_library_it_waits(run) -> None:
    code = "import_after('library.part', 'extension'); print('asked'); import library; print('between'); import library.part"
    assert lines(run(code)) == ["asked", "library", "between", "part", "extension"]


def test_behind_the_library_it_is_imported_at_once(run) -> None:
    assert lines(run("import library.part; import_after('library.part', 'extension')")) == [
        "library",
        "part",
        "extension",
    ]


def test_asking_twice_and_importing_twice_changes_nothing(run) -> None:
    code = (
        "import_after('library.part', 'extension'); import_after('library.part', 'extension')\n"
        "import library.part, importlib; importlib.import_module('library.part')"
    )
    assert lines(run(code)) == ["library", "part", "extension"]


def test_the_extension_first(run) -> None:
    """It imports the library itself, which asks for the extension while that is half imported."""
    code = "import_after('library.part', 'extension'); import extension, library.part; print(library.part.REGISTRY)"
    assert lines(run(code)) == ["library", "part", "extension", "{'ours':", "1}"]


def test_a_library_that_is_not_installed_is_missing_as_before_and_looked_for_again(run) -> None:
    code = (
        "import_after('no_such_library', 'extension')\n"
        "for _ in range(2):\n  try: import no_such_library\n  except ModuleNotFoundError as error: print(error.name)\n"
        "print(len([f for f in sys.meta_path if getattr(f, 'trigger', '') == 'no_such_library']))"
    )
    assert lines(run(code)) == ["no_such_library", "no_such_library", "1"]


def test_the_module_keeps_its_loader_for_those_who_ask(run) -> None:
    code = "import_after('library.part', 'extension'); import library.part, inspect; print(inspect.getsource(library.part))"
    assert "REGISTRY" in lines(run(code))


@pytest.mark.parametrize(
    "code",
    [
        "import_after('library', 'failing'); import library",
        "import library; import_after('library', 'failing')",
    ],
)
def test_an_extension_that_fails_warns_and_leaves_the_library_as_it_is(run, code: str) -> None:
    done = run(code)
    assert lines(done) == ["library"]
    assert "failing cannot extend library of the installed version" in done.stderr
    assert "broken extension" in done.stderr


def test_a_mere_look_up_does_not_use_the_hook_up(run) -> None:
    """As transformers does to see what is installed."""
    code = (
        "import_after('library', 'extension'); import importlib.util; importlib.util.find_spec('library')\n"
        "print('looked'); import library; print(len([f for f in sys.meta_path if getattr(f, 'trigger', '') == 'library']))"
    )
    assert lines(run(code)) == ["looked", "library", "part", "extension", "0"]
