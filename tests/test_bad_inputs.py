"""What a user can do wrong, and what the message must say."""

import sys
from pathlib import Path

import pytest

from rac_modifier.errors import RacError
from tests.bad_inputs import (
    checkpoints,
    commands,
    packing,
    problems,
    recipes,
    runs,
    settings,
    stores,
)
from tests.bad_inputs.bench import Bench

TABLE = Path(__file__).parents[1] / "docs" / "errors.md"
HEAD = """# Errors

Each mistake below ends in a `RacError` whose message contains the text on the right. On the
command line the message is printed without a traceback, with exit code 1.
`python -m tests.test_bad_inputs` writes this table, and the same file tests every row of it.

| mistake | the message contains |
|---|---|
"""
MODULES = (recipes, settings, problems, stores, runs, checkpoints, packing, commands)
CASES = [case for module in MODULES for case in module.CASES]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.did)
def test_the_message_says_what_is_wrong(case, tiny_folder, trace_store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bench = Bench(tiny_folder, trace_store, tmp_path, monkeypatch)
    with pytest.raises(RacError) as caught:
        case.run(bench)
    assert case.says in str(caught.value)
    assert len(str(caught.value)) < 10_000


def errors_table() -> str:
    rows = [f"| {c.did} | {c.says.replace('|', chr(92) + '|')} |" for c in CASES]
    return HEAD + "\n".join(rows) + "\n"


def test_no_case_is_there_twice():
    assert len({c.did for c in CASES}) == len(CASES) >= 25
    assert not [c.did for c in CASES if "\n" in c.did + c.says]  # a row of the table is a line


def test_the_published_table_is_that_of_the_tests():
    """If this fails: python -m tests.test_bad_inputs."""
    assert TABLE.read_text() == errors_table()


if __name__ == "__main__":
    sys.stdout.write(f"{TABLE}: {TABLE.write_text(errors_table())} characters\n")
