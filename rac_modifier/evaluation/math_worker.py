"""Compare answers as mathematics, one JSON line in and one out, in a process that may be lost.

Run by `verify.equal_as_mathematics` as a plain script. A pruned model can write `9^{9^{9^9}}`, and evaluating that
blocks inside C code where no Python timeout reaches and, outside the main thread, no signal handler may be set. Here the
alarm keeps its default action, which ends this process wherever it is.
"""

from __future__ import annotations

import json
import signal
import sys

SECONDS_PER_ANSWER = 5
READY = "ready\n"


def equal(answer: str, reference: str) -> bool:
    """Whether two bare answers are the same mathematical object."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    # Boxed, so that both sides are read by the same rules: a bare "(1,2)" or "\sqrt{2}" is not found at all.
    targets = [LatexExtractionConfig(), ExprExtractionConfig()]
    gold, found = (parse(f"\\boxed{{{x}}}", targets, parsing_timeout=0) for x in (reference, answer))
    return bool(verify(gold, found, timeout_seconds=0))


def main() -> None:
    """Say that it is ready, then answer `[answer, reference]` with `true` or `false` until standard input ends."""
    import math_verify  # noqa: F401  (its second of import time must not count against the first answer)

    print(READY, end="", flush=True)
    for line in sys.stdin:
        answer, reference = json.loads(line)
        signal.alarm(SECONDS_PER_ANSWER)
        result = equal(answer, reference)
        signal.alarm(0)
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
