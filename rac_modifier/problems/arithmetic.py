"""Arithmetic problems with a written chain of thought and a checkable answer.

The embedded reasoner was trained on them. Recipes and `rac eval` use them by default, since
they need no download. Problems are split by their operands, not by their wording: no
operands of the test split are in another split, in any phrasing.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "calibration", "test"]
_MOST_REPEATS = 10_000  # in a row, before a split counts as exhausted


@dataclass(frozen=True)
class Solved:
    """A question, the chain of thought that solves it, and the answer as text."""

    task: str
    operands: tuple[int, ...]
    question: str
    thinking: str
    answer: str

    @property
    def identity(self) -> str:
        """Return the same text for the same operands in another order or phrasing."""
        return f"{self.task}:{','.join(map(str, sorted(self.operands)))}"

    @property
    def split(self) -> Split:
        """Return the split of the problem: 5 % test, 10 % calibration, 85 % training."""
        digest = hashlib.blake2b(self.identity.encode(), digest_size=8).digest()
        bucket = int.from_bytes(digest, "big") % 100
        return "test" if bucket < 5 else "calibration" if bucket < 15 else "train"


def _column_sum(numbers: list[int]) -> str:
    """Add numbers column by column from the right, a line per column."""
    width = len(str(max(numbers)))
    rows = [str(n).zfill(width) for n in numbers]
    lines, carry, digits = [], 0, ""
    for column in range(width - 1, -1, -1):
        total, steps = carry, []
        for row in rows:
            digit = int(row[column])
            steps.append(f"{total}+{digit}={total + digit}")
            total += digit
        carry, digit = divmod(total, 10)
        digits = f"{digit}{digits}"
        lines.append(f"{', '.join(steps)}, write {digit} carry {carry}")
    if carry:
        digits = f"{carry}{digits}"
    return " ".join(rows) + "\n" + "\n".join(lines) + f"\n-> {digits}"


def _addition(rng: random.Random) -> tuple[tuple[int, ...], str, str, str]:
    numbers = [rng.randint(100, 9999) for _ in range(rng.choice((2, 3)))]
    plus = " + ".join(map(str, numbers))
    question = rng.choice((f"What is {plus}?", f"Compute {plus}.", f"Find the sum {plus}."))
    return tuple(numbers), question, _column_sum(numbers), str(sum(numbers))


def _times_digit(number: int, digit: int) -> str:
    carry, steps = 0, []
    for d in reversed(str(number)):
        product = int(d) * digit
        total = product + carry
        steps.append(f"{d}*{digit}={product}, {product}+{carry}={total}")
        carry = total // 10
    return f"{number}*{digit}: " + "; ".join(steps) + f" -> {number * digit}"


def _multiplication(rng: random.Random) -> tuple[tuple[int, ...], str, str, str]:
    a, b = rng.randint(12, 999), rng.randint(12, 99)
    question = rng.choice((f"What is {a} * {b}?", f"Compute {a} * {b}.", f"Multiply {a} by {b}."))
    tens, ones = divmod(b, 10)
    lines = [_times_digit(a, ones), _times_digit(a, tens), _column_sum([a * ones, a * tens * 10])]
    return (a, b), question, "\n".join(lines), str(a * b)


def _gcd(rng: random.Random) -> tuple[tuple[int, ...], str, str, str]:
    while True:
        factor = rng.choice((1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 15))
        a, b = factor * rng.randint(2, 199 // factor), factor * rng.randint(2, 199 // factor)
        x, y = max(a, b), min(a, b)
        lines: list[str] = []
        while x != y and len(lines) <= 16:
            lines.append(f"{x}-{y}={x - y}")
            x, y = max(x - y, y), min(x - y, y)
        if x == y and len(lines) >= 4:
            break
    question = rng.choice(
        (f"What is gcd({a}, {b})?", f"Find the greatest common divisor of {a} and {b}.")
    )
    return (a, b), question, "\n".join(lines) + f"\n{x}={y}", str(math.gcd(a, b))


def _division(rng: random.Random) -> tuple[tuple[int, ...], str, str, str]:
    a, b = rng.randint(1000, 99999), rng.randint(3, 9)
    in_words = f"Divide {a} by {b} and drop the remainder."
    question = rng.choice((f"What is {a} // {b}?", in_words, f"Compute {a} // {b}."))
    remainder, lines, digits = 0, [], ""
    for d in str(a):
        head = remainder * 10 + int(d)
        q, r = divmod(head, b)
        lines.append(f"{head}: {b}*{q}={head - r}, {head}-{head - r}={r}, write {q}")
        digits, remainder = digits + str(q), r
    return (a, b), question, "\n".join(lines) + f"\n-> {digits}", str(a // b)


TASKS: dict[str, Callable[[random.Random], tuple[tuple[int, ...], str, str, str]]] = {
    "addition": _addition,
    "multiplication": _multiplication,
    "gcd": _gcd,
    "division": _division,
}


def generate(seed: int | str, split: Split) -> Iterator[Solved]:
    """Yield problems of a split without end, tasks in turn; a seed decides which."""
    rng = random.Random(f"{seed}/{split}")
    while True:
        for task, draw in TASKS.items():
            problem = Solved(task, *draw(rng))
            while problem.split != split:
                problem = Solved(task, *draw(rng))
            yield problem


def generate_distinct(seed: int | str, split: Split) -> Iterator[Solved]:
    """Yield problems of a split, no two with the same operands in any order, until none is new."""
    seen: set[str] = set()
    repeats = 0
    for problem in generate(seed, split):
        if problem.identity not in seen:
            repeats = 0
            seen.add(problem.identity)
            yield problem
        elif (repeats := repeats + 1) > _MOST_REPEATS:
            return
