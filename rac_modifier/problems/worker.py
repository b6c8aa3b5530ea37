"""Compare answers, one JSON line in and one out, in a process that may be lost.

Run by `processes.ask` as a plain script. A model can write `9^{9^{9^9}}`, and evaluating that blocks inside C code where no
Python timeout reaches and, outside the main thread, no signal handler may be set. Here the alarm keeps its default action, which
ends this process wherever it is. It counts processor time, so that a busy machine does not change a verdict.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Any

READY = "ready\n"


def equal(answer: str, reference: str) -> bool:
    """Whether two bare answers are the same mathematical object."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    # Boxed, so that both sides are read by the same rules: a bare "(1,2)" or "\sqrt{2}" is not found at all.
    targets = [LatexExtractionConfig(), ExprExtractionConfig()]
    gold, found = (parse(f"\\boxed{{{x}}}", targets, parsing_timeout=0) for x in (reference, answer))
    return bool(verify(gold, found, timeout_seconds=0))


def solves(answer: str, task: str, seed: int, size: int, index: int) -> bool:
    """Whether reasoning-gym gives an answer to item `index` of a generated data set its full score."""
    data = _dataset(task, seed, size)
    return bool(data.score_answer(answer, data[index]) == 1.0)


@lru_cache(maxsize=8)
def _dataset(task: str, seed: int, size: int) -> Any:
    import reasoning_gym

    return reasoning_gym.create_dataset(task, seed=seed, size=size)


_CHECKS: dict[str, Callable[..., bool]] = {"mathematics": equal, "reasoning-gym": solves}


def main(check: str, seconds: float) -> None:
    """Say that it is ready, then answer the check's arguments with `true` or `false` until standard input ends."""
    # A second or two of import time must not count against the first answer.
    __import__("math_verify" if check == "mathematics" else "reasoning_gym")
    print(READY, end="", flush=True)
    for line in sys.stdin:
        arguments = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, seconds)
        result = _CHECKS[check](*arguments)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
