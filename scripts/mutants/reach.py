"""Which tests reach a mutant: recordings per test file, and the choice from them."""

from __future__ import annotations

import ast
import json
import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from scripts.mutants.operators import Mutant
from scripts.mutants.plugin import digest, record_name

TOOL = Path(__file__).parents[2]  # so that pytest finds the plugin


@dataclass(frozen=True)
class Environment:
    """A Python with what it tests."""

    name: str
    python: str
    test_files: tuple[str, ...]
    pytest_options: tuple[str, ...] = ()


@dataclass
class RecordedTest:
    """A test that passes, and the lines that it runs, per file."""

    name: str
    seconds: float
    lines: dict[str, frozenset[int]] = field(repr=False)

    @property
    def file(self) -> str:
        """Relative to the tree."""
        return self.name.split("::")[0]


def pytest_command(
    environment: Environment, tree: Path, package: str, **settings: str
) -> tuple[list[str], dict[str, str]]:
    """The beginning of a pytest call in a tree, and its environment variables; `settings` are those of the plugin."""
    path = os.pathsep.join([str(tree), str(TOOL), *filter(None, [os.environ.get("PYTHONPATH")])])
    variables = {
        **os.environ,
        "PYTHONPATH": path,
        "PYTHONDONTWRITEBYTECODE": "1",  # a mutant may have the size and the time of the file before it
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "HYPOTHESIS_PROFILE": "mutants",
        "MUTANTS_PACKAGE": package,
        **settings,
    }
    command = [
        environment.python,
        "-m",
        "pytest",
        "-q",
        "-p",
        "scripts.mutants.plugin",
        "-p",
        "no:cacheprovider",
    ]
    return [*command, *environment.pytest_options], variables


def record(environment: Environment, tree: Path, package: str, folder: Path) -> list[RecordedTest]:
    """The tests of an environment with what they reach; runs those whose file, or a file that they reach, changed."""
    folder = folder / environment.name
    stale = [
        file for file in environment.test_files if not _is_current(folder / record_name(file), tree)
    ]
    for file in stale:
        (folder / record_name(file)).unlink(missing_ok=True)
    if stale:
        print(
            f"{environment.name}: recording what the tests of {len(stale)} files reach", flush=True
        )
        command, variables = pytest_command(environment, tree, package, MUTANTS_RECORD=str(folder))
        done = subprocess.run([*command, *stale], cwd=tree, env=variables, check=False)
        if done.returncode not in (0, 1, 5):
            raise SystemExit(
                f"{environment.name}: pytest ended with {done.returncode}; mend what it prints, then try again"
            )
        for file in stale:
            if not (folder / record_name(file)).is_file():  # nothing of it runs in this environment
                nothing = {
                    "test_file": file,
                    "digest": digest(tree / file),
                    "sources": {},
                    "tests": {},
                }
                (folder / record_name(file)).write_text(json.dumps(nothing))
    tests, failed = [], []
    same: dict[
        tuple[int, ...], frozenset[int]
    ] = {}  # many tests run the same lines of a file: one set in memory
    for file in environment.test_files:
        for name, test in json.loads((folder / record_name(file)).read_text())["tests"].items():
            if not test["passed"]:
                failed.append(name)
            elif test["ran"]:
                lines = {
                    source: same.setdefault(tuple(numbers), frozenset(numbers))
                    for source, numbers in test["lines"].items()
                }
                tests.append(RecordedTest(name, test["seconds"], lines))
    if failed:
        print(
            f"{environment.name}: {len(failed)} tests fail without a mutant and are left out:",
            *failed,
            sep="\n  ",
        )
    return tests


def _is_current(path: Path, tree: Path) -> bool:
    if not path.is_file():
        return False
    record = json.loads(path.read_text())
    files = {record["test_file"]: record["digest"], **record["sources"]}
    return all(
        (tree / file).is_file() and digest(tree / file) == known for file, known in files.items()
    )


def importers(tree: Path, package: str) -> dict[str, set[str]]:
    """Per file of the package: the files that import from it."""
    files = {
        ".".join(p.relative_to(tree).with_suffix("").parts): p.relative_to(tree)
        for p in (tree / package).rglob("*.py")
    }
    found: dict[str, set[str]] = {path.as_posix(): set() for path in files.values()}
    for path in files.values():
        for node in ast.walk(ast.parse((tree / path).read_bytes())):
            if isinstance(node, ast.ImportFrom):
                names = [
                    node.module or "",
                    *(f"{node.module}.{alias.name}" for alias in node.names),
                ]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                continue
            for name in names:
                if name in files:
                    found[files[name].as_posix()].add(path.as_posix())
    return found


def choose(
    mutant: Mutant, tests: list[RecordedTest], users: set[str], budget: float
) -> list[RecordedTest]:
    """The tests that may notice a mutant, nearest first, up to `budget` seconds of them.

    A line in a function: the tests that run it. A line that runs at import: the tests that run another line of its file,
    or of a file that imports it (`users`). Where that gives none (the line runs in another process), the tests of the
    file, and those in the mirrored test file and its folder.
    """
    first, last = mutant.lines
    near = [
        test
        for test in tests
        if any(first <= line <= last for line in test.lines.get(mutant.file, ()))
    ]
    if mutant.at_import or not near:
        mirror = _mirror(mutant.file)
        near = [
            test
            for test in tests
            if mutant.file in test.lines
            or test.file.startswith(mirror.rsplit("/", 1)[0] + "/")
            or (mutant.at_import and not users.isdisjoint(test.lines))
        ]
    chosen, left = [], budget
    for test in sorted(near, key=lambda test: (_distance(mutant.file, test.file), test.seconds)):
        if test.seconds <= left:
            chosen.append(test)
            left -= test.seconds
    order = {file: place for place, file in enumerate(dict.fromkeys(test.file for test in chosen))}
    return sorted(
        chosen, key=lambda test: order[test.file]
    )  # file by file: shared fixtures are set up once


def _mirror(file: str) -> str:
    """package/room/x.py -> tests/room/test_x.py."""
    folder, name = file.rsplit("/", 1)
    return "/".join(["tests", *folder.split("/")[1:], f"test_{name}"])


def _distance(file: str, test_file: str) -> int:
    mirror = _mirror(file)
    if test_file == mirror:
        return 0
    return 1 if test_file.rsplit("/", 1)[0] == mirror.rsplit("/", 1)[0] else 2
