"""The worked examples of CONTRIBUTING.md, applied to a copy of the package."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
HEADING = "## How to add something"


class Example(NamedTuple):
    """One section: new files by path, and (path, text, replacement) of each change elsewhere."""

    title: str
    files: dict[str, str]
    changes: list[tuple[str, str, str]]


def examples() -> list[Example]:
    """The sections under HEADING."""
    sections = []
    for section in re.split(r"^### ", TEXT.partition(HEADING)[2], flags=re.MULTILINE)[1:]:
        files, changes = {}, []
        code = re.findall(r"^```(\w+)\n(.*?)^```$", section, flags=re.MULTILINE | re.DOTALL)
        for kind, body in code:
            if kind == "diff":
                changes += changes_of(body)
            else:
                head, _, code = body.partition("\n")
                files[head.partition("new file: ")[2]] = code
        sections.append(Example(section.partition("\n")[0], files, changes))
    return sections


def changes_of(diff: str) -> list[tuple[str, str, str]]:
    """`# path`, then any number of a line with `-` and the lines with `+` that replace its text."""
    changes: list[tuple[str, str, str]] = []
    path = ""
    for line in diff.splitlines():
        mark, text = line[0], line[1:]
        if mark == "#":
            path = text.strip()
        elif mark == "-":
            changes.append((path, text, ""))
        else:
            path_, old, new = changes.pop()
            changes.append((path_, old, f"{new}\n{text}" if new else text))
    return changes


EXAMPLES = examples()


@pytest.fixture(scope="session")
def ran(tmp_path_factory) -> dict[str, str]:
    """The outcome of each test, by `path::name`, of the copy with all examples."""
    tree = tmp_path_factory.mktemp("tree")
    ignore = shutil.ignore_patterns("__pycache__", "assets")
    for name in ("rac_modifier", "tests", "csrc"):
        shutil.copytree(ROOT / name, tree / name, ignore=ignore)
    for name in ("pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, tree)
    (ROOT / "build").mkdir(exist_ok=True)
    (tree / "build").symlink_to(ROOT / "build")  # which keeps the compiled library
    for example in EXAMPLES:
        for path, code in example.files.items():
            assert not (tree / path).exists(), f"{path} is no new file"
            (tree / path).parent.mkdir(exist_ok=True)
            (tree / path).write_text(code)
        for path, old, new in example.changes:
            text = (tree / path).read_text()
            assert text.count(old) == 1, (
                f"CONTRIBUTING.md, {example.title}: {path} has {text.count(old)} times: {old}"
            )
            (tree / path).write_text(text.replace(old, new))
    new = [path for example in EXAMPLES for path in example.files]
    tests = [path for path in new if path.startswith("tests/")]
    order = "imports_run_one_way or import_each_other_in_a_circle or not test_imports"
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rA", "-q"]
    command += [*tests, "tests/test_imports.py", "-k", order]
    process = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    python = [path for path in new if path.endswith(".py")]
    lint = subprocess.run(
        [sys.executable, "-m", "ruff", "check", *python], cwd=tree, capture_output=True, text=True
    )
    outcomes = {
        test: outcome
        for outcome, test in re.findall(
            r"^(PASSED|FAILED|ERROR) (\S+)", process.stdout, re.MULTILINE
        )
    }
    said = {"output": process.stdout + process.stderr, "lint": lint.stdout + lint.stderr}
    return {**outcomes, **said}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.title)
def test_the_tests_of_an_example_pass(example, ran):
    (path,) = (path for path in example.files if path.startswith("tests/"))
    if skipped := re.search(rf"^SKIPPED \[\d+\] {path}:\d+: (.*)", ran["output"], re.MULTILINE):
        pytest.skip(skipped[1])  # without a compiler, or on another processor
    names = re.findall(r"^def (test_\w+)", example.files[path], flags=re.MULTILINE)
    outcomes = {
        name: [ran[t] for t in ran if t.partition("[")[0] == f"{path}::{name}"] for name in names
    }
    assert names
    assert all(actual and set(actual) == {"PASSED"} for actual in outcomes.values()), (
        f"{outcomes}\n{ran['output']}"
    )


def test_the_examples_keep_the_order_of_imports(ran):
    imports = "tests/test_imports.py"
    house = {test: outcome for test, outcome in ran.items() if test.startswith(imports)}
    assert set(house.values()) == {"PASSED"}, ran["output"]
    assert len(house) == 2


def test_the_examples_pass_lint(ran):
    assert ran["lint"].strip() == "All checks passed!"
