"""The mutation tests themselves (scripts/mutants): which mutants there are, which tests are chosen, what survives."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.mutants.__main__ import ROOMS, draw, read_harmless
from scripts.mutants.operators import mutants_of
from scripts.mutants.reach import RecordedTest, choose

ROOT = Path(__file__).parents[1]
HARMLESS = ROOT / "scripts" / "mutants_harmless.txt"


def changed(source: str) -> set[str]:
    """The mutants of a source, as original -> mutant."""
    return {f"{m.original} -> {m.mutated}" for m in mutants_of("x.py", source.encode())}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("if a < b: f", {"if a < b: f -> if (a <= b): f"}),
        (
            "x = a == b != c",
            {"x = a == b != c -> x = (a != b != c)", "x = a == b != c -> x = (a == b == c)"},
        ),
        ("x = a * b", {"x = a * b -> x = (a / b)"}),
        ("x = a and b", {"x = a and b -> x = (a or b)"}),
        ("x = not a", {"x = not a -> x = a"}),
        ("while a.b: f", {"while a.b: f -> while (not a.b): f"}),
        ("x = [a for a in b if a]", {"x = [a for a in b if a] -> x = [a for a in b if (not a)]"}),
        ("x = 0", {"x = 0 -> x = 1"}),
        ("x = 8", {"x = 8 -> x = 7", "x = 8 -> x = 9"}),
        ("x = 0.5  # half", {"x = 0.5 -> x = 1.0", "x = 0.5 -> x = 0.25"}),
        ("x = True", {"x = True -> x = False"}),
        ("x = a[b:c]", {"x = a[b:c] -> x = a[:c]", "x = a[b:c] -> x = a[b:]"}),
        ("x += a", {"x += a -> pass", "x += a -> x -= a"}),
        ("a.b = c", {"a.b = c -> pass"}),
        ("f(a)", {"f(a) -> pass"}),
        ("x = f(a, key=b)", {"x = f(a, key=b) -> x = f(a)"}),
        ("x = f(a, out=b)", set()),  # only saves memory
        ("f(a, out=b)", {"f(a, out=b) -> pass", "f(a, out=b) -> f(a)"}),
        ("raise ValueError(f'{1 + 1} {2 > 1}')", {"raise ValueError(f'{1 + 1} {2 > 1}') -> pass"}),
        ("def f():\n    return a", {"return a -> return None"}),
        ("def f():\n    return None", set()),
        ("def f(a: X[3] = 0): ...", {"def f(a: X[3] = 0): ... -> def f(a: X[3] = 1): ..."}),
        ("for a in b: continue", {"for a in b: continue -> for a in b: break"}),
        (
            "é = 'é'; x = 1 ",
            {"é = 'é'; x = 1 -> é = 'é'; x = 0", "é = 'é'; x = 1 -> é = 'é'; x = 2"},
        ),
        ("assert a < b", set()),
        ("'a docstring'", set()),
        ("x = f'{a + 1}'", set()),
        ("logger.info(1)", set()),
        ("x = zip(a, b, strict=True)", set()),
    ],
)
def test_mutants_of_a_line(source, expected):
    assert changed(source) == expected


def test_a_mutant_is_applied_where_it_was_found():
    source = (
        "def outer():\n    'é'\n    def inner():\n        return (a\n            < b)\n".encode()
    )
    first, last = mutants_of("x.py", source)
    assert [first.function, last.function] == ["outer.inner"] * 2
    assert first.apply(source).decode().split("def inner():")[1].split() == ["return", "None"]
    assert last.apply(source) == source.replace(b"a\n            < b", b"(a <= b)")
    assert last.lines == (4, 5)
    assert not last.at_import


def test_what_runs_at_import():
    source = b"class A:\n    field = Field(1)\n    def f(self, a=2):\n        return 3\n"
    assert {m.line: m.at_import for m in mutants_of("x.py", source)} == {2: True, 3: True, 4: False}


def test_equal_lines_of_a_function_have_names_of_their_own():
    names = [m.identity for m in mutants_of("x.py", b"def f():\n    g(1)\n    g(1)\n")]
    assert len(set(names)) == len(names) == 6


def test_a_sample_has_one_mutant_per_line_and_keeps_it_when_other_lines_change():
    def lines(first: str) -> bytes:
        return "\n".join([first, *(f"x{i} = a + {i}" for i in range(40))]).encode()

    before = draw(mutants_of("x.py", lines("pass")), 10, seed=1)
    after = draw(mutants_of("x.py", lines("y = 5\nz = 6")), 10, seed=1)
    assert len(before) == len({m.line for m in before}) == 10
    assert len({m.identity for m in before} & {m.identity for m in after}) >= 8
    assert draw(mutants_of("x.py", lines("pass")), 10, seed=2) != before


def test_the_tests_of_a_line_nearest_first_within_the_budget():
    (inside,) = (
        m for m in mutants_of("p/room/x.py", b"N = 0\ndef f():\n    return a") if not m.at_import
    )
    (constant,) = (m for m in mutants_of("p/room/x.py", b"N = 0"))

    def test(name: str, seconds: float, **lines: set[int]) -> RecordedTest:
        return RecordedTest(
            name,
            seconds,
            {file.replace("_", "/") + ".py": frozenset(found) for file, found in lines.items()},
        )

    tests = [
        test("tests/other/test_a.py::far", 1, p_room_x={3}),
        test("tests/room/test_y.py::slow", 50, p_room_x={3}),
        test("tests/room/test_y.py::near", 2, p_room_x={3}),
        test("tests/room/test_x.py::nearest", 9, p_room_x={2, 3}),
        test("tests/room/test_x.py::another_line", 1, p_room_x={5}),
        test("tests/other/test_a.py::user", 1, p_room_y={1}),
    ]

    def chosen(mutant, tests=tests, **options):
        return [
            test.name.split("::")[1]
            for test in choose(mutant, tests, {"p/room/y.py"}, options.get("budget", 1000))
        ]

    assert chosen(inside) == ["nearest", "near", "slow", "far"]
    assert chosen(inside, budget=20) == ["nearest", "near", "far"]
    assert set(chosen(constant)) == {"nearest", "another_line", "near", "slow", "far", "user"}
    assert chosen(inside, tests[-2:]) == [
        "another_line"
    ]  # no test runs the line: those of the file and its folder


def test_every_harmless_mutant_exists_and_has_a_reason():
    harmless = read_harmless(HARMLESS)
    files = {identity.split(" | ")[0] for identity in harmless}
    assert all(file.split("/")[1] in ROOMS for file in files)
    there = {m.identity for file in files for m in mutants_of(file, (ROOT / file).read_bytes())}
    assert harmless.keys() - there == set()
    assert all(len(reason) > 15 for reason in harmless.values())


def test_a_harmless_mutant_without_a_reason_is_refused(tmp_path):
    (tmp_path / "list.txt").write_text("x.py | f | a -> b\n")
    with pytest.raises(SystemExit, match="has no reason"):
        read_harmless(tmp_path / "list.txt")


CODE = """
LIMIT = 10

def small(number):
    return number < LIMIT

def total(numbers):
    return sum(numbers) + 1

def unseen():
    return 5
"""
TESTS = """
import pytest
from tiny.room.code import small, total, unseen

@pytest.fixture(scope="session")
def shared():
    return total([1, 2])

def test_small():
    assert small(9)
    assert not small(11)  # and 10?

def test_total(shared):
    assert shared == 4
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A package whose tests have two holes: the limit itself, and a function that no test calls."""
    for folder in ("tiny", "tiny/room", "tests", "tests/room"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").write_text("")
    (tmp_path / "tiny" / "room" / "code.py").write_text(CODE)
    (tmp_path / "tests" / "room" / "test_code.py").write_text(TESTS)
    (tmp_path / "pyproject.toml").write_text("[tool.pytest.ini_options]\n")
    return tmp_path


def mutate(tree: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "scripts.mutants",
        f"--tree={tree}",
        "--package=tiny",
        "--rooms=room",
    ]
    command += [f"--harmless={tree}/harmless.txt", "--workers=2", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_bad_test_lets_its_mutant_survive(tree):
    pytest.importorskip("coverage")
    done = mutate(tree)
    assert done.returncode == 1, done.stdout + done.stderr
    assert (tree / "tiny" / "room" / "code.py").read_text() == CODE
    outcomes = [
        json.loads(line)["outcome"]
        for line in (tree / ".mutants" / "results.jsonl").read_text().splitlines()
    ]
    assert len(outcomes) == 4  # lines with mutants
    results = {o["identity"].split(" | ")[1]: o["result"] for o in outcomes}
    # either mutant of the limit (9, 11), and either of its comparison (<=, return None)
    assert results["total"] == "killed", "the fixture's lines count for the test that uses it"
    assert results["unseen"] == "survived"
    (survivor,) = (o["identity"] for o in outcomes if "unseen" in o["identity"])
    assert survivor in done.stdout

    again = mutate(tree)
    assert "4 in the sample, 4 of them known" in again.stdout
    assert again.returncode == 1

    # mending the tests is enough: what they reach is recorded again, survivors are tried again
    (tree / "tests" / "room" / "test_code.py").write_text(
        TESTS + "\ndef test_more():\n    assert unseen() == 5\n    assert not small(10)\n"
    )
    mended = mutate(tree)
    assert mended.returncode == 0, mended.stdout + mended.stderr
    assert "0 of 4 survived" in mended.stdout


def test_a_survivor_in_the_list_is_let_through(tree):
    pytest.importorskip("coverage")
    survivors = {
        m.identity for m in mutants_of("tiny/room/code.py", CODE.encode()) if m.function != "total"
    }
    (tree / "harmless.txt").write_text(
        "".join(f"{identity}  # there to be tested\n" for identity in survivors)
    )
    done = mutate(tree)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "more survivors are in the list" in done.stdout
