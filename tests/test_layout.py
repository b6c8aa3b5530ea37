"""Where tests are, how long files may be, and that each test draws numbers of its own."""

import subprocess
import sys
from pathlib import Path

from tests.conftest import SERVING_TESTS

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "rac_modifier"
LONGEST = 360  # lines
# Modules without a test file of their own, and why. An __init__.py without a function or a
# class needs no entry.
NO_MIRROR = {
    "__init__.py": "the public names and what importing them costs: tests/test_imports.py",
    "cli/__main__.py": "calls rac_modifier.cli:main, which tests/cli runs as a process",
    "errors.py": "the class RacError alone; every test of a message raises it",
}
MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


def mirror(module: Path) -> Path:
    """kernels/cpu/linear.py -> kernels/cpu/test_linear.py; kernels/__init__.py ->
    kernels/test_kernels.py."""
    name = module.parent.name if module.name == "__init__.py" else module.stem
    return module.with_name(f"test_{name}.py")


def defines_something(module: Path) -> bool:
    """Whether a file has a function or a class."""
    return any(
        line.lstrip().startswith(("def ", "async def ", "class "))
        for line in module.read_text().splitlines()
    )


def test_every_module_has_a_mirrored_test_file():
    wanted = [
        module
        for module in MODULES
        if module.as_posix() not in NO_MIRROR
        and (module.name != "__init__.py" or defines_something(PACKAGE / module))
    ]
    assert len(wanted) > 80
    missing = [
        f"{module}: tests/{mirror(module)} is missing"
        for module in wanted
        if not (TESTS / mirror(module)).is_file()
    ]
    assert not missing, "\n".join(missing)


def test_a_mirrored_test_file_has_tests():
    empty = [
        str(mirror(module))
        for module in MODULES
        if (TESTS / mirror(module)).is_file()
        and "def test_" not in (TESTS / mirror(module)).read_text()
    ]
    assert empty == []


def test_exceptions_are_of_files_that_exist():
    assert [name for name in NO_MIRROR if not (PACKAGE / name).is_file()] == []
    assert [name for name in NO_MIRROR if (TESTS / mirror(Path(name))).is_file()] == [], (
        "has a test file now"
    )
    assert all(len(reason) > 20 for reason in NO_MIRROR.values())


def test_no_file_of_the_package_is_too_long():
    lengths = {str(module): len((PACKAGE / module).read_text().splitlines()) for module in MODULES}
    assert {name: length for name, length in lengths.items() if length > LONGEST} == {}


def test_every_folder_of_tests_is_a_package():
    """Otherwise two test files of one name cannot be collected together."""
    folders = {path.parent for path in TESTS.rglob("*.py")}
    assert [
        str(folder.relative_to(TESTS))
        for folder in sorted(folders)
        if not (folder / "__init__.py").is_file()
    ] == []


def test_what_the_serving_environment_runs_exists():
    assert [name for name in SERVING_TESTS if not (TESTS / name).exists()] == []


PROBE = """
import random
import numpy
import pytest
import torch
from hypothesis import given, strategies

def draw():
    return [torch.rand(1).item(), numpy.random.random(), random.random()]

@pytest.fixture(scope="module")
def shared():
    return draw()

def test_before(shared):
    draw()

@given(strategies.integers(0, 1))
def test_examples(number):
    print("EXAMPLE", draw())

def test_after(shared):
    print("DRAWS", shared, draw())
"""


def draws(folder: Path, *selected: str) -> dict[str, set[str]]:
    """What the tests of the probe printed, by their first word."""
    (folder / "test_probe.py").write_text(PROBE)
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "tests.conftest"]
    command += [f"--rootdir={folder}", *selected, str(folder / "test_probe.py")]
    process = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    printed: dict[str, set[str]] = {}
    for line in process.stdout.splitlines():
        word, _, numbers = line.lstrip(".").partition(" ")
        printed.setdefault(word, set()).add(numbers)
    return printed


def test_a_test_draws_the_same_numbers_alone_and_behind_others(tmp_path):
    """Its own numbers and those of a fixture that it shares; from torch, numpy and random."""
    together = draws(tmp_path)
    (alone,) = draws(tmp_path, "-k", "test_after")["DRAWS"]
    assert together["DRAWS"] == {alone}
    assert len(set(alone.replace("[", "").replace("]", "").split())) == 6
    assert len(together["EXAMPLE"]) == 1  # so that hypothesis can repeat a failure
