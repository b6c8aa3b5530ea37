"""Where the thinking ends in a completion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rac_modifier.problems.answers import THINK_END


def thinking_length(tokenizer: Any, ids: Sequence[int]) -> int:
    """Tokens up to and including `</think>`, which may be one token or several; all tokens where there is none."""
    tag = tokenizer.encode(THINK_END, add_special_tokens=False)
    if len(tag) == 1:
        return ids.index(tag[0]) + 1 if tag[0] in ids else len(ids)

    def ended(length: int) -> bool:
        return THINK_END in tokenizer.decode(list(ids[:length]))

    low, high = 0, len(ids)
    while low < high:  # finds the shortest prefix whose text holds the tag
        middle = (low + high) // 2
        low, high = (low, middle) if ended(middle) else (middle + 1, high)
    return low
