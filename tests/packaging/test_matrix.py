"""The parts of scripts/matrix.py that need no environments."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from scripts import matrix
from tests.conftest import SERVING_TESTS

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_serving_environment_runs_what_the_makefile_and_conftest_name():
    """Without names, pytest would import the conftest.py of folders that need llm-compressor."""
    assert sorted(matrix.serving_tests()) == sorted(f"tests/{name}" for name in SERVING_TESTS)


def test_every_test_of_the_matrix_is_there():
    assert [name for name in matrix.TESTS if not (ROOT / "tests" / name).exists()] == []


def test_every_requirement_of_the_matrix_has_a_lower_end():
    requirements = matrix.requirements(PROJECT)
    assert len({Requirement(line).name for line in requirements}) == len(requirements) > 5
    assert all("==" in matrix.lowest(line) for line in requirements)


def test_a_missing_interpreter_is_a_named_result():
    row = matrix.Row("3.99", "newest")
    matrix.run(row, keep=False)
    assert row.result == "skipped: no Python 3.99 on this machine"
    assert matrix.table([row]).splitlines()[-1] == f"| 3.99 | newest | {row.result} |  |"


@pytest.mark.parametrize(
    ("log", "code", "result"),
    [
        ("...\n12 passed, 1 skipped in 3.20s", 0, "12 passed, 1 skipped"),
        ("=== 1 failed, 12 passed in 3.20s (0:00:03) ===", 1, "FAILED: 1 failed, 12 passed"),
        ("$ sh", 137, "FAILED: ended by signal 9"),
    ],
)
def test_what_a_log_says(log, code, result):
    assert matrix.conclusion(log, code).startswith(result)
