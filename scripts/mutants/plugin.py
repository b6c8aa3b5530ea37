"""A pytest plugin: records which test runs which lines, or runs a list of tests in its order.

Set by the environment, so that a test's own pytest processes are not affected by options:
- MUTANTS_PACKAGE: the package that is mutated; it has to be the copy in the working directory.
- MUTANTS_RECORD: a folder; writes a JSON file there per test file.
- MUTANTS_TESTS: a file of node ids, one per line; runs these tests only, in this order.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

WRONG_COPY = 97  # exit status
FIXTURE = "fixture "  # a context that begins with this is no test


def digest(path: Path) -> str:
    """Of a file's content."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def record_name(test_file: str) -> str:
    """The JSON file of a test file's recording."""
    return test_file.replace("/", ".") + ".json"


def pytest_configure(config: pytest.Config) -> None:
    """Switch on what the environment asks for; processes that a test starts do not inherit it."""
    package = os.environ.pop("MUTANTS_PACKAGE", None)
    if package is None:
        return
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None or not Path(spec.origin).is_relative_to(Path.cwd()):
        pytest.exit(
            f"{package} is imported from {spec and spec.origin}, not from {Path.cwd()}", WRONG_COPY
        )
    if folder := os.environ.pop("MUTANTS_RECORD", None):
        config.pluginmanager.register(Recorder(config, package, Path(folder)))
    if listed := os.environ.pop("MUTANTS_TESTS", None):
        config.pluginmanager.register(Chosen(Path(listed).read_text().splitlines()))


class Chosen:
    """Runs the tests of a list, in its order."""

    def __init__(self, tests: list[str]) -> None:
        self.place = {test: place for place, test in enumerate(tests)}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        """Leave out and sort."""
        others = [item for item in items if item.nodeid not in self.place]
        config.hook.pytest_deselected(items=others)
        items[:] = sorted(
            (i for i in items if i.nodeid in self.place), key=lambda item: self.place[item.nodeid]
        )


class Recorder:
    """Coverage with the test's node id as the context; what a shared fixture runs counts for each test that uses it."""

    def __init__(self, config: pytest.Config, package: str, folder: Path) -> None:
        import coverage

        self.root, self.folder = Path.cwd(), folder
        self.coverage = coverage.Coverage(
            data_file=None, config_file=False, include=[f"{self.root}/{package}/*"]
        )
        self.context = ""
        self.shared: dict[str, dict[str, set[int]]] = {}  # fixture context -> file -> lines
        self.tests: dict[str, dict[str, Any]] = {}
        self.fixtures: dict[str, list[str]] = {}  # test -> the contexts of its shared fixtures
        folder.mkdir(parents=True, exist_ok=True)

    def _switch(self, context: str) -> None:
        self.context = context
        self.coverage.switch_context(context)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """What importing runs is not recorded."""
        self.coverage.start()

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(
        self, item: pytest.Item, nextitem: pytest.Item | None
    ) -> Iterator[None]:
        """One test with its own set-up."""
        self.tests[item.nodeid] = {"passed": True, "ran": False}
        self.fixtures[item.nodeid] = [
            self._fixture(name, item)
            for name in getattr(item, "fixturenames", ())
            if name != "request"
        ]
        self._switch(item.nodeid)
        start = time.perf_counter()
        result = yield
        self.tests[item.nodeid]["seconds"] = round(time.perf_counter() - start, 3)
        self._switch("")
        if nextitem is None or nextitem.path != item.path:
            self._write(item.path)
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Whether the test passed: set-up, call and tear-down."""
        if report.nodeid in self.tests:
            self.tests[report.nodeid]["passed"] &= not report.failed
            self.tests[report.nodeid]["ran"] |= report.when == "call" and not report.skipped

    @staticmethod
    def _fixture(name: str, item: pytest.Item) -> str:
        return f"{FIXTURE}{name} {item.path}"

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_fixture_setup(
        self, fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest
    ) -> Iterator[Any]:
        """A fixture that several tests share has a context of its own."""
        if fixturedef.scope == "function":
            return (yield)
        outer = self.context
        place = "" if fixturedef.scope == "session" else request.path
        self._switch(f"{FIXTURE}{fixturedef.argname} {place}")
        try:
            return (yield)
        finally:
            self._switch(outer)

    def _write(self, path: Path) -> None:
        """The recording of the test file that is done."""
        self.coverage.stop()
        lines: dict[str, dict[str, set[int]]] = {test: {} for test in self.tests}
        data = self.coverage.get_data()
        for measured in data.measured_files():
            file = Path(measured).relative_to(self.root).as_posix()
            for line, contexts in data.contexts_by_lineno(measured).items():
                for context in contexts:
                    of = (
                        self.shared.setdefault(context, {})
                        if context.startswith(FIXTURE)
                        else lines.get(context)
                    )
                    if of is not None:
                        of.setdefault(file, set()).add(line)
        for test, names in self.fixtures.items():
            for name in names:
                session_wide = FIXTURE + name.removeprefix(FIXTURE).split(" ")[0] + " "
                for context in (name, session_wide):
                    for file, found in self.shared.get(context, {}).items():
                        lines[test].setdefault(file, set()).update(found)
        files = sorted({file for found in lines.values() for file in found})
        test_file = path.relative_to(self.root).as_posix()
        record = {
            "test_file": test_file,
            "digest": digest(path),
            "sources": {file: digest(self.root / file) for file in files},
            "tests": {
                test: {
                    **self.tests[test],
                    "lines": {file: sorted(found) for file, found in lines[test].items()},
                }
                for test in self.tests
            },
        }
        (self.folder / record_name(test_file)).write_text(json.dumps(record))
        self.tests, self.fixtures = {}, {}
        self.coverage.erase()
        self.coverage.start()
