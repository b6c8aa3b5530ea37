"""The final answer in a reasoning model's text, and whether it is right."""

from __future__ import annotations

import re
from typing import Protocol

THINK_END = "</think>"
_BOX_OR_BRACE = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
_INTEGER = re.compile(r"([+-]?)0*([0-9]+)")


class Verifier(Protocol):
    """Compares answers of tasks whose answers are not mathematics, or not unique.

    With reasoning-gym, for instance: `lambda answer, _: dataset.score_answer(answer, entry) == 1.0`.
    """

    def __call__(self, answer: str, reference: str) -> bool:
        """Whether the model's answer is right, given the problem's reference answer."""
        ...


def extract_answer(text: str) -> str | None:
    r"""The content of the last `\boxed{...}` with balanced braces after the thinking, or None.

    Thinking ends at the first `</think>`; a text without one is searched as a whole, since the model may not use
    such tags. Escaped braces (`\{`) do not count, and of nested boxes the inner one is the answer.

    >>> extract_answer(r"so \boxed{3}?</think> It is \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    """
    _, tag, after = text.partition(THINK_END)
    answer_text = after if tag else text
    open_braces: list[tuple[bool, int]] = []  # is it a box, where its content starts
    last: tuple[int, int] | None = None
    for match in _BOX_OR_BRACE.finditer(answer_text):
        token = match.group()
        if token.endswith("{") and token != r"\{":
            open_braces.append((token != "{", match.end()))
        elif token == "}" and open_braces:
            is_box, start = open_braces.pop()
            if is_box and (last is None or start > last[0]):
                last = (start, match.start())
    return None if last is None else answer_text[slice(*last)].strip()


def is_correct(text: str, answer: str, verifier: Verifier | None = None) -> bool:
    """Whether a completion's final answer is right; a missing or unreadable answer is wrong."""
    extracted = extract_answer(text)
    return extracted is not None and bool((verifier or equal_answers)(extracted, answer))


def equal_answers(answer: str, reference: str) -> bool:
    """Whether two answers are equal: as text, as integers of any length, or else as mathematics (math-verify)."""
    answer, reference = _bare(answer), _bare(reference)
    if not answer or not reference:
        return False
    if answer == reference:
        return True
    first, second = _INTEGER.fullmatch(answer), _INTEGER.fullmatch(reference)
    if first and second:
        return _canonical(first) == _canonical(second)
    return equal_as_mathematics(answer, reference)


def _bare(answer: str) -> str:
    r"""An answer without the `\boxed{}` or `$` that data sets leave around it."""
    boxed = extract_answer(answer)
    bare = (answer if boxed is None else boxed).strip()
    return bare.strip("$").strip() if bare.startswith("$") and bare.endswith("$") else bare


def _canonical(integer: re.Match[str]) -> str:
    """Compared as text: Python refuses to convert more than 4,300 digits."""
    sign, digits = integer.groups()
    return "-" + digits if sign == "-" and digits != "0" else digits


def equal_as_mathematics(answer: str, reference: str) -> bool:
    r"""Whether two bare LaTeX or plain expressions are equal, by math-verify, in any thread.

    Raises:
        RacError: math-verify is not installed, or broken.
    """
    from rac_modifier.problems import (
        answer_checker,
    )  # needs pebble, which the serving environment lacks

    return answer_checker.check_answer("mathematics", answer, reference)
