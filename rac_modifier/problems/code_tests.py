r"""Programming problems in LiveCodeBench's layout: their tests, the program in an answer, and whether it passes.

A row has `public_test_cases` and `private_test_cases`, each the text of a JSON list of {"input", "output", "testtype"}, and
`metadata`, the text of a JSON object. Tests of type "stdin" compare what a program prints; those of type "functional" call
`func_name` of the metadata (a method of the class Solution, or a function) with a JSON value per line of the input, and compare
what it returns. As in LiveCodeBench (arXiv 2403.07974), all tests must pass, lines are compared without space around them and
else as numbers, and a program finds the usual modules imported.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

from rac_modifier.errors import RacError
from rac_modifier.problems.answers import THINK_END
from rac_modifier.problems.programs import DEFAULT, Limits, run_program

PUBLIC, PRIVATE, STARTER, METADATA = (
    "public_test_cases",
    "private_test_cases",
    "starter_code",
    "metadata",
)
READS_STDIN = (
    "Write a Python program that reads from standard input and writes the answer to standard output. Do not test it on the "
    "examples. Put the whole program in one code block:\n```python\n# your code\n```"
)
COMPLETES = (
    "Complete this Python code, and put all of it in one code block:\n```python\n{starter}\n```"
)
_BLOCK = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)^[ \t]*```[ \t]*$", re.MULTILINE | re.DOTALL)
_FUTURE = re.compile(r"^from __future__ import [^\n]*\n?", re.MULTILINE)
_MODULES = (
    "string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random", "statistics", "itertools",
    "functools", "operator", "io", "sys", "json", "builtins", "typing",
)  # fmt: skip
_IMPORTS = "; ".join(
    [*(f"from {name} import *" for name in _MODULES), *(f"import {name}" for name in _MODULES)]
)
_PRELUDE = f"{_IMPORTS}; sys.setrecursionlimit(50000)\n"
# What a called program prints goes to standard error, and what is behind `if __name__ == "__main__"` is not run.
_BEFORE_CALL = "__name__ = 'solution'; _rac_output, sys.stdout = sys.stdout, sys.stderr\n"
_CALL = """
import json as _rac_json, sys as _rac_sys
_rac_function = getattr(Solution() if 'Solution' in globals() else _rac_sys.modules['__main__'], {name!r})
_rac_inputs = [_rac_json.loads(line) for line in _rac_sys.stdin.read().split('\\n') if line.strip()]
_rac_output.write(_rac_json.dumps(_rac_function(*_rac_inputs)))
"""


@dataclass(frozen=True)
class CodeTests:
    """The tests of a problem.

    Attributes:
        function: what is called; None: the program reads standard input.
        cases: inputs and the outputs that are expected, as text.
    """

    function: str | None
    cases: tuple[tuple[str, str], ...]

    @property
    def digest(self) -> str:
        """Of all of it; problems carry it in place of an answer."""
        return hashlib.sha256(json.dumps([self.function, self.cases]).encode()).hexdigest()


def read_tests(row: Mapping[str, Any], where: str) -> CodeTests:
    """The tests of a row.

    Args:
        row: with the columns of the layout; private tests and metadata may be empty.
        where: the row's name in messages.

    Raises:
        RacError: no tests, tests that are not JSON text (pickled ones are not read), of several types, or without what they need.
    """
    cases = [*_cases(row, where, PUBLIC), *_cases(row, where, PRIVATE)]
    if not cases:
        raise RacError(
            f"{where}: no tests in {PUBLIC} and {PRIVATE}; complete the row, or remove it"
        )
    kinds = sorted({kind for _, _, kind in cases})
    if len(kinds) > 1:
        raise RacError(
            f"{where}: tests of types {' and '.join(kinds)}; give the tests of one problem one type"
        )
    tests = tuple((given, expected) for given, expected, _ in cases)
    if kinds == ["stdin"]:
        return CodeTests(None, tests)
    metadata = _json(row.get(METADATA) or "{}", where, METADATA)
    function = metadata.get("func_name") if isinstance(metadata, dict) else None
    if not isinstance(function, str) or not function.isidentifier():
        raise RacError(
            f'{where}: its tests call a function, and {METADATA} has no func_name; add {{"func_name": ...}}'
        )
    for given, expected in tests:
        for text in (*filter(str.strip, given.split("\n")), expected):
            _json(text, where, "the tests of a function")
    return CodeTests(function, tests)


def question_of(question: str, row: Mapping[str, Any]) -> str:
    """The question with what the program must be like."""
    starter = row.get(STARTER)
    form = (
        COMPLETES.format(starter=starter.strip())
        if isinstance(starter, str) and starter.strip()
        else READS_STDIN
    )
    return f"{question.strip()}\n\n{form}"


def extract_program(text: str) -> str | None:
    """The last closed code block after the thinking, or None."""
    _, tag, after = text.partition(THINK_END)
    blocks = _BLOCK.findall(after if tag else text)
    return blocks[-1] if blocks else None


class Programs:
    """Whether the program in an answer passes the tests of its problem: a `Verifier` that takes seconds, in any thread."""

    slow = True
    extract = staticmethod(extract_program)

    def __init__(self, tests: Sequence[CodeTests], limits: Limits = DEFAULT):
        self._tests, self._limits = {one.digest: one for one in tests}, limits

    def __call__(self, answer: str, reference: str) -> bool:
        """Run program `answer` on the tests whose digest is `reference`, up to the first that it fails."""
        tests = self._tests[reference]
        return all(self._passes(answer, tests.function, *case) for case in tests.cases)

    def _passes(self, program: str, function: str | None, given: str, expected: str) -> bool:
        outcome = run_program(whole_program(program, function), given, self._limits)
        if outcome.end != "finished":
            return False
        if function is None:
            return same_output(outcome.output, expected)
        try:
            return bool(json.loads(outcome.output) == json.loads(expected))
        except (ValueError, RecursionError):
            return False


def whole_program(program: str, function: str | None) -> str:
    """A program as it is run: with the usual imports, and, where a function is called, the call."""
    future = "".join(_FUTURE.findall(program))
    source = (
        f"{future}{_PRELUDE}{'' if function is None else _BEFORE_CALL}{_FUTURE.sub('', program)}"
    )
    return source if function is None else source + _CALL.format(name=function)


def same_output(output: str, expected: str) -> bool:
    """Whether two outputs are equal line by line: as text without space around it, or as numbers.

    >>> same_output("1 2.0\\n yes ", "1.0 2\\nyes"), same_output("1\\n2", "1 2")
    (True, False)
    """
    lines, wanted = (
        [line.strip() for line in text.strip().split("\n")] for text in (output, expected)
    )
    return len(lines) == len(wanted) and all(map(_same_line, lines, wanted))


def _same_line(line: str, wanted: str) -> bool:
    if line == wanted:
        return True
    try:
        return [Decimal(word) for word in line.split()] == [
            Decimal(word) for word in wanted.split()
        ]
    except InvalidOperation:
        return False


def _cases(row: Mapping[str, Any], where: str, column: str) -> list[tuple[str, str, str]]:
    text = row.get(column)
    if text is None or (isinstance(text, str) and not text.strip()):
        return []
    found = _json(text, where, column)
    if not isinstance(found, list):
        raise RacError(
            f"{where}: column {column!r} must hold a JSON list of tests, it holds {str(text)[:40]!r}"
        )
    cases: list[tuple[str, str, str]] = []
    for number, case in enumerate(found, 1):
        values = case if isinstance(case, dict) else {}
        given, expected, kind = (values.get(name) for name in ("input", "output", "testtype"))
        if (
            not isinstance(given, str)
            or not isinstance(expected, str)
            or kind not in ("stdin", "functional")
        ):
            raise RacError(
                f"{where}: test {number} of {column!r} must have the texts input, output, and testtype (stdin or functional)"
            )
        cases.append((given, expected, str(kind)))
    return cases


def _json(text: Any, where: str, what: str) -> Any:
    if not isinstance(text, str):
        raise RacError(
            f"{where}: {what} must be JSON text, it is a {type(text).__name__}; write it as text"
        )
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        if what == PRIVATE and re.fullmatch(r"[A-Za-z0-9+/\s]+=*\s*", text):
            raise RacError(
                f"{where}: column {what!r} is compressed and pickled. Reading that can run code that the file brings, so it is "
                "not read; write these tests as JSON text, or empty the column to check programs by the public tests alone"
            ) from error
        raise RacError(f"{where}: {what} is not JSON ({error}); write it as JSON text") from error
