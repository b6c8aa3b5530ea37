"""Arithmetic problems with a checkable answer.

The embedded reasoner was trained on them; training/arithmetic_thinking.py solves them in steps.
Recipes and `rac eval` use them by default, since they need no download. Problems are split by their
operands, not by their wording: no operands of the test split are in another split, in any phrasing.
"""

import hashlib
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "calibration", "test"]
_MOST_REPEATS = 10_000  # in a row, before a split counts as exhausted
_MOST_SUBTRACTIONS = 17  # of a greatest common divisor


@dataclass(frozen=True)
class Solved:
    """A question, and the answer as text."""

    task: str
    operands: tuple[int, ...]
    question: str
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


Drawn = tuple[tuple[int, ...], str, str]  # operands, question, answer


def _addition(rng: random.Random) -> Drawn:
    numbers = [rng.randint(100, 9999) for _ in range(rng.choice((2, 3)))]
    plus = " + ".join(map(str, numbers))
    question = rng.choice((f"What is {plus}?", f"Compute {plus}.", f"Find the sum {plus}."))
    return tuple(numbers), question, str(sum(numbers))


def _multiplication(rng: random.Random) -> Drawn:
    a, b = rng.randint(12, 999), rng.randint(12, 99)
    question = rng.choice((f"What is {a} * {b}?", f"Compute {a} * {b}.", f"Multiply {a} by {b}."))
    return (a, b), question, str(a * b)


def _gcd(rng: random.Random) -> Drawn:
    while True:
        factor = rng.choice((1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 15))
        a, b = factor * rng.randint(2, 199 // factor), factor * rng.randint(2, 199 // factor)
        if 4 <= len(subtractions(a, b)) <= _MOST_SUBTRACTIONS:
            break
    question = rng.choice(
        (f"What is gcd({a}, {b})?", f"Find the greatest common divisor of {a} and {b}.")
    )
    return (a, b), question, str(math.gcd(a, b))


def subtractions(a: int, b: int) -> list[tuple[int, int]]:
    """Return the pairs that Euclid's algorithm subtracts until both numbers are equal."""
    pairs, x, y = [], max(a, b), min(a, b)
    while x != y:
        pairs.append((x, y))
        x, y = max(x - y, y), min(x - y, y)
    return pairs


def _division(rng: random.Random) -> Drawn:
    a, b = rng.randint(1000, 99999), rng.randint(3, 9)
    in_words = f"Divide {a} by {b} and drop the remainder."
    question = rng.choice((f"What is {a} // {b}?", in_words, f"Compute {a} // {b}."))
    return (a, b), question, str(a // b)


TASKS: dict[str, Callable[[random.Random], Drawn]] = {
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
