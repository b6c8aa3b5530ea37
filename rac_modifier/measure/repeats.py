"""Where the end of a completion begins to repeat itself."""

from collections.abc import Sequence

_LONGEST_PERIOD = 128  # tokens of a repeated stretch
COPIES, _TAIL = 3, 64  # copies and tokens that a repeating tail has at least


def loop_at_end(items: Sequence[int] | Sequence[str]) -> tuple[int, int] | None:
    """Return the index where the repeating end begins, and its period; None if no end repeats."""
    for period in range(1, min(_LONGEST_PERIOD, len(items) // COPIES) + 1):
        same = 0
        while period + same < len(items) and items[-1 - same] == items[-1 - same - period]:
            same += 1
        if same >= (COPIES - 1) * period and same + period >= _TAIL:
            return len(items) - same - period, period
    return None


def repeated_tail(ids: Sequence[int], finish_reason: str) -> int:
    """Count the repeated tokens at the end of a truncated completion; 0 if it ended."""
    loop = loop_at_end(ids) if finish_reason == "length" else None
    return 0 if loop is None else len(ids) - sum(loop)


def end_of_copies(ids: Sequence[int]) -> int | None:
    """Return where a repeating end may be cut and still repeats; None if no end repeats.

    Three copies are left, and 64 tokens behind the first.
    """
    loop = loop_at_end(ids)
    return None if loop is None else loop[0] + max(COPIES * loop[1], _TAIL + loop[1])
