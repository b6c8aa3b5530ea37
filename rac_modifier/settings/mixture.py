"""The parts of a mixture: what each is made of, and the line that a user writes for them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rac_modifier.errors import RacError

Kind = Literal["traces", "prompts", "generic"]
KINDS: tuple[Kind, ...] = ("traces", "prompts", "generic")
_SYNONYMS = {"text": "generic"}
# A comma inside a name ("reasoning-gym:gcd,chain_sum") does not end a part.
_BETWEEN_PARTS = re.compile(r"\s*,\s*(?=(?:traces|prompts|generic|text)\s*[:@])")
_EXAMPLE = '"traces:math@0.7, traces:code@0.2, text:c4@0.1"'


@dataclass(frozen=True)
class Part:
    """One part of the calibration set; without a name it is the recipe's own `traces`, or `calibration.generic`."""

    kind: Kind
    name: str | None = None

    @classmethod
    def parse(cls, key: str) -> Part:
        """ "traces", "traces:math", "text:c4", "prompts:open-r1/OpenR1-Math-220k".

        Raises:
            RacError: another kind.
        """
        word, colon, name = (piece.strip() for piece in key.partition(":"))
        kind = _SYNONYMS.get(word, word)
        if kind not in KINDS or (colon and not name):
            raise RacError(
                f"mixture names {key!r}; the kinds are {', '.join(KINDS)}, and kind:name for a source, as in {_EXAMPLE}"
            )
        return cls(kind, name or None)

    @property
    def key(self) -> str:
        """As it stands in a mixture."""
        return self.kind if self.name is None else f"{self.kind}:{self.name}"


def read_mixture(value: Any) -> Any:
    """A mixture as a mapping, from the one line that it may be written in; anything else is left to the schema.

    Raises:
        RacError: a part of the line without its share.
    """
    if not isinstance(value, str):
        return value
    mixture: dict[str, float] = {}
    for part in _BETWEEN_PARTS.split(value.strip().rstrip(",")):
        key, at, share = part.rpartition("@")
        try:
            mixture[key.strip()] = mixture.get(key.strip(), 0.0) + float(share)
        except ValueError:
            at = ""
        if not at:
            raise RacError(
                f"mixture: {part!r} has no share; write each part as kind@share or kind:name@share, as in {_EXAMPLE}"
            )
    return mixture


def check_mixture(mixture: Mapping[str, float]) -> dict[str, float]:
    """The parts that have a share, in the order of their kinds.

    Raises:
        RacError: an unknown kind, a share out of range, or shares that do not sum to 1.
    """
    parts: dict[Part, float] = {}
    for key, share in mixture.items():
        part = Part.parse(key)
        if not (math.isfinite(share) and share >= 0):
            raise RacError(f"mixture gives {key} the share {share}; use a number from 0 to 1")
        parts[part] = parts.get(part, 0.0) + share
    total = sum(parts.values())
    if abs(total - 1) > 1e-6:
        raise RacError(f"the shares of mixture {dict(mixture)} sum to {total:g}; make them sum to 1")
    ordered = sorted(parts, key=lambda part: KINDS.index(part.kind))
    return {part.key: parts[part] for part in ordered if parts[part] > 0}


def part_tokens(mixture: Mapping[str, float], tokens: int) -> dict[str, int]:
    """The budget of each part, rounded so that all of them sum to `tokens`."""
    budgets: dict[str, int] = {}
    for key, share in mixture.items():
        budgets[key] = round(tokens * share)
    *_, last = mixture
    budgets[last] += tokens - sum(budgets.values())
    return budgets
