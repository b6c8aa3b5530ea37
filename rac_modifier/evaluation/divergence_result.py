"""How far a pruned model is from the dense one: per token, by position in the completion, and in total."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import fmean
from typing import Any

from rac_modifier.errors import RacError


@dataclass(frozen=True)
class TokenDivergence:
    """One completion: for each of its tokens, where dense and pruned model had read the same tokens before it."""

    kl: Sequence[float]  # KL(dense || pruned) in nats
    agrees: Sequence[bool]  # whether both rank the same token first


@dataclass(frozen=True)
class PositionBin:
    """The completion tokens from position `start` (0 is the first token) to before `end`."""

    start: int
    end: int
    sequences: int  # completions that reach the bin
    tokens: int
    kl: float
    kl_stderr: float | None  # None where fewer than two completions reach
    agreement: float
    agreement_stderr: float | None


@dataclass(frozen=True)
class DivergenceResult:
    """Divergence of one pruned model on a set of sequences; compare only with results on the same sequences.

    Standard errors take completions, not tokens, as independent: tokens of one completion err together.
    """

    label: str
    sequences: int
    tokens: int  # of completions
    kl: float  # mean KL(dense || pruned) a completion token, in nats
    kl_stderr: float | None  # None for a single sequence
    agreement: float  # share of tokens where both models rank the same token first
    agreement_stderr: float | None
    bins: tuple[PositionBin, ...]  # of equal width, from the first to the last position of the longest completion
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_dict` is its inverse."""
        return {**dataclasses.asdict(self), "bins": [dataclasses.asdict(b) for b in self.bins]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DivergenceResult:
        """A result from `as_dict`'s output.

        Raises:
            RacError: a field is missing or unknown.
        """
        try:
            bins = tuple(PositionBin(**b) for b in values.get("bins", ()))
            return cls(**{**values, "bins": bins})
        except TypeError as error:
            raise RacError(f"not a divergence result ({error}); measure again with this version") from error


def summarise_divergence(
    rows: Sequence[TokenDivergence], *, label: str, bins: int = 16, seconds: float
) -> DivergenceResult:
    """The result of completions, none of them empty, measured in `seconds`."""
    assert rows, "a measurement without sequences is refused earlier"
    kl, kl_stderr = mean_over_tokens([row.kl for row in rows])
    agreement, agreement_stderr = mean_over_tokens([row.agrees for row in rows])
    longest = max(len(row.kl) for row in rows)
    width = math.ceil(longest / bins)
    return DivergenceResult(
        label=label,
        sequences=len(rows),
        tokens=sum(len(row.kl) for row in rows),
        kl=kl,
        kl_stderr=kl_stderr,
        agreement=agreement,
        agreement_stderr=agreement_stderr,
        bins=tuple(_bin(rows, start, start + width) for start in range(0, longest, width)),
        seconds=seconds,
    )


def mean_over_tokens(rows: Sequence[Sequence[float]]) -> tuple[float, float | None]:
    """Mean over all tokens of all rows, and its standard error with rows as the independent units.

    The mean is a ratio, total over token count, both random; with residuals r_i = sum_i - mean * n_i of m rows the error
    is sqrt(m / (m - 1) * sum r_i^2) / sum n_i (Cochran, Sampling Techniques, 1977, section 6.3, for whole clusters).
    """
    mean = fmean(chain.from_iterable(rows))
    m, count = len(rows), sum(map(len, rows))
    if m < 2:
        return mean, None
    squares = math.fsum((math.fsum(row) - mean * len(row)) ** 2 for row in rows)
    return mean, math.sqrt(m / (m - 1) * squares) / count


def _bin(rows: Sequence[TokenDivergence], start: int, end: int) -> PositionBin:
    kls = [part for row in rows if (part := row.kl[start:end])]
    kl, kl_stderr = mean_over_tokens(kls)
    agreement, agreement_stderr = mean_over_tokens([part for row in rows if (part := row.agrees[start:end])])
    return PositionBin(start, end, len(kls), sum(map(len, kls)), kl, kl_stderr, agreement, agreement_stderr)
