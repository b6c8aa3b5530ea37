"""Rows in LiveCodeBench's layout, programs in answers, and verdicts."""

from __future__ import annotations

import base64
import json
import zlib
from typing import Any

import pytest

from rac_modifier.errors import RacError
from rac_modifier.problems.answers import is_correct
from rac_modifier.problems.code_tests import (
    CodeTests,
    Programs,
    extract_program,
    question_of,
    read_tests,
    same_output,
    whole_program,
)


def row(
    *cases: tuple[str, str],
    kind: str = "stdin",
    private: Any = "[]",
    metadata: str = "{}",
    starter: str = "",
) -> dict:
    tests = [{"input": given, "output": expected, "testtype": kind} for given, expected in cases]
    return {
        "question_content": "Double it.",
        "public_test_cases": json.dumps(tests),
        "private_test_cases": private,
        "metadata": metadata,
        "starter_code": starter,
    }


DOUBLE = row(
    ("1\n", "2\n"), private=json.dumps([{"input": "4", "output": "8", "testtype": "stdin"}])
)
SUM = row(
    ("[1, 2]\n3", "[4, 5]"),
    kind="functional",
    metadata='{"func_name": "add"}',
    starter="class Solution:\n",
)


def passes(program: str, tests: CodeTests) -> bool:
    return is_correct(
        f"<think>```python\nprint(9)\n```</think>So:\n```python\n{program}\n```\n",
        tests.digest,
        Programs([tests]),
    )


def test_a_row_with_public_and_private_tests() -> None:
    tests = read_tests(DOUBLE, "row 0")
    assert tests == CodeTests(None, (("1\n", "2\n"), ("4", "8")))
    assert tests.digest != CodeTests(None, (("1\n", "2\n"),)).digest
    assert read_tests({**DOUBLE, "private_test_cases": None}, "row 0") == CodeTests(
        None, (("1\n", "2\n"),)
    )
    assert read_tests(SUM, "row 1") == CodeTests("add", (("[1, 2]\n3", "[4, 5]"),))
    assert "one code block:\n```python\nclass Solution:\n```" in question_of("Add.", SUM)
    assert question_of(" Double. ", DOUBLE).startswith(
        "Double.\n\nWrite a Python program that reads from standard input"
    )


PICKLED = base64.b64encode(zlib.compress(b"\x80\x04\x95anything")).decode()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"private_test_cases": PICKLED},
            "'private_test_cases' is compressed and pickled. Reading that can run code",
        ),
        ({"private_test_cases": "{1"}, "row 7: private_test_cases is not JSON"),
        ({"private_test_cases": ["x"]}, "private_test_cases must be JSON text, it is a list"),
        ({"public_test_cases": "[]"}, "no tests in public_test_cases and private_test_cases"),
        ({"public_test_cases": '{"input": "1"}'}, "must hold a JSON list of tests"),
        (
            {"public_test_cases": '[{"input": "1", "output": 2, "testtype": "stdin"}]'},
            "test 1 of 'public_test_cases'",
        ),
        (
            {"public_test_cases": '[{"input": "1", "output": "2", "testtype": "file"}]'},
            "stdin or functional",
        ),
        ({"public_test_cases": SUM["public_test_cases"]}, "metadata has no func_name"),
        (
            {"public_test_cases": SUM["public_test_cases"], "metadata": '{"func_name": "a b"}'},
            "metadata has no func_name",
        ),
        ({"public_test_cases": "[" * 100_000}, "public_test_cases is not JSON"),
        (
            {"private_test_cases": SUM["public_test_cases"], "metadata": '{"func_name": "f"}'},
            "tests of types functional and stdin",
        ),
    ],
)
def test_a_row_that_cannot_be_used_is_named(changes: dict[str, Any], says: str) -> None:
    base = DOUBLE if "private_test_cases" in changes else {**DOUBLE, "private_test_cases": ""}
    with pytest.raises(RacError) as caught:
        read_tests({**base, **changes}, "row 7")
    assert str(caught.value).startswith("row 7: ")
    assert says in str(caught.value)


def test_a_value_that_is_not_json_in_the_tests_of_a_function() -> None:
    broken = row(("[1, 2", "3"), kind="functional", metadata='{"func_name": "add"}')
    with pytest.raises(RacError, match="the tests of a function is not JSON"):
        read_tests(broken, "row 7")


def test_the_last_closed_block_after_the_thinking() -> None:
    assert (
        extract_program("a\n```py\nx = 1\n```\nb\n```python\ny = 2\nz = 3\n```\n")
        == "y = 2\nz = 3\n"
    )
    assert extract_program("```\nx\n```\n</think> no code") is None
    assert extract_program("</think>```python\nx\n```") == "x\n"
    assert extract_program("```python\nx = 1\n") is None, "it was cut"


def test_verdicts_on_programs_that_read_input() -> None:
    tests = read_tests(DOUBLE, "row")
    assert passes("print(2 * int(input()))", tests)
    assert passes(
        "from __future__ import annotations\nif __name__ == '__main__':\n    print(2 * int(input()), end=' ')",
        tests,
    )
    assert not passes("print(2)", tests), "the second test"
    assert not passes("print(2 * int(input())); raise SystemExit(1)", tests)
    assert not is_correct("it is 2", tests.digest, Programs([tests]))


def test_verdicts_on_functions() -> None:
    tests = read_tests(SUM, "row")
    method = "class Solution:\n    def add(self, xs: List[int], n: int) -> List[int]:\n        print('noise')\n        return {}"
    assert passes(method.format("[x + n for x in xs]"), tests)
    assert passes(method.format("tuple(x + n for x in xs)"), tests)
    assert passes(
        "def add(xs, n):\n    return [x + n for x in xs]\nif __name__ == '__main__':\n    input()",
        tests,
    )
    assert not passes(method.format("[x * n for x in xs]"), tests)
    assert not passes(method.format("{1, 2}"), tests), "no JSON value"
    assert not passes("def plus(xs, n): return [4, 5]", tests)
    assert not passes("print([4, 5])", tests)


def test_usual_modules_are_imported_and_builtins_stay() -> None:
    source = whole_program(
        "print(pow(2, 3, 5), sqrt(4), Counter('aa'), math.pi > 3, heapq.heappop([1]), datetime.date.min)",
        None,
    )
    tests = CodeTests(None, (("", "3 2.0 Counter({'a': 2}) True 1 0001-01-01"),))
    assert passes(source, tests)


@pytest.mark.parametrize(
    ("output", "expected", "same"),
    [
        ("1 2\n3\n", "1 2\n3", True),
        ("1.0", "1", True),
        ("1.10 2", "1.1 2.0", True),
        ("yes", "YES", False),
        ("1 2", "1\n2", False),
        ("1", "1\n1", False),
        ("0.1", "0.10000001", False),
        ("a 1", "a 1.0", False),
        ("", "", True),
        ("nan", "1", False),
    ],
)
def test_outputs_line_by_line(output: str, expected: str, same: bool) -> None:
    assert same_output(output, expected) is same
