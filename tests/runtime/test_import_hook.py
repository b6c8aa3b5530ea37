"""A module that is imported right after another one, each case in a process of its own."""

import subprocess
import sys

import pytest


@pytest.fixture
def run(tmp_path):
    """Run code where `library`, `library.part` and `extension` can be imported."""
    (tmp_path / "library").mkdir()
    (tmp_path / "library" / "__init__.py").write_text("print('library')\n")
    (tmp_path / "library" / "part.py").write_text("REGISTRY = {}\nprint('part')\n")
    (tmp_path / "extension.py").write_text(
        "from library import part\npart.REGISTRY['ours'] = 1\nprint('extension')\n"
    )
    (tmp_path / "failing.py").write_text("raise RuntimeError('broken extension')\n")

    def run(code: str) -> subprocess.CompletedProcess[str]:
        head = f"import importlib.util, inspect, sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        head += "from rac_modifier.runtime.import_hook import import_after\n"
        head += "def hooks(name):\n"
        head += "  return [f for f in sys.meta_path if getattr(f, 'trigger', '') == name]\n"
        command = [sys.executable, "-c", head + code]
        process = subprocess.run(command, capture_output=True, text=True)
        assert process.returncode == 0, process.stderr
        return process

    return run


BEFORE = "import_after('library.part', 'extension'); "


@pytest.mark.parametrize(
    ("code", "printed"),
    [
        (f"{BEFORE}print('asked'); import library; print('between'); import library.part",
         "asked library between part extension"),
        (f"import library.part; {BEFORE}", "library part extension"),
        (f"{BEFORE}{BEFORE}import library.part; importlib.import_module('library.part')",
         "library part extension"),
        # The extension imports the library itself, which asks for it while that is half imported.
        (f"{BEFORE}import extension, library.part; print(library.part.REGISTRY)",
         "library part extension {'ours': 1}"),
        (f"{BEFORE}import library.part; print('REGISTRY' in inspect.getsource(library.part))",
         "library part extension True"),
        # transformers looks up what is installed without importing it
        ("import_after('library', 'extension'); importlib.util.find_spec('library'); "
         "print('looked')\n"
         "importlib.util.find_spec('library'); import library; print(len(hooks('library')))",
         "looked library part extension 0"),
        ("import_after('no_such_library', 'extension')\n"
         "for _ in range(2):\n  try: import no_such_library\n  except ModuleNotFoundError as e: "
         "print(e.name)\n"
         "print(len(hooks('no_such_library')))", "no_such_library no_such_library 1"),
    ],
)  # fmt: skip
def test_when_the_extension_is_imported(run, code, printed):
    assert run(code).stdout.split() == printed.split()


def test_an_extension_that_fails_warns_and_leaves_the_library_as_it_is(run):
    order = ("import_after('library', 'failing')", "import library")
    for code in (order, order[::-1]):
        process = run("; ".join(code))
        assert process.stdout.split() == ["library"]
        assert "failing cannot extend library of the installed version" in process.stderr
        assert "broken extension" in process.stderr
