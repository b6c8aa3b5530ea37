"""Which zeros a pruned weight must have: N of every M consecutive inputs, or a share of all."""

import re
from dataclasses import dataclass
from typing import Self

from rac_modifier.errors import RacError


@dataclass(frozen=True)
class Pattern:
    """A sparsity pattern; build it with `parse` (values of a recipe), `n_of_m` or `unstructured`.

    `n` of every `m` consecutive input weights of an output row are zero: as in llm-compressor, N is
    the number *pruned*. Unstructured patterns have n = m = 0. `sparsity` is the share of zeros.
    """

    sparsity: float
    n: int = 0
    m: int = 0

    @classmethod
    def unstructured(cls, sparsity: float) -> Self:
        """Prune any weights, a share `sparsity` of them, 0 < sparsity < 1."""
        if not 0.0 < sparsity < 1.0:  # also refuses nan
            raise RacError(f"sparsity {sparsity}: must lie strictly between 0 and 1; use 0.5")
        return cls(sparsity=float(sparsity))

    @classmethod
    def nothing(cls) -> Self:
        """Prune no weight, in modules that are only quantized."""
        return cls(sparsity=0.0)

    @classmethod
    def n_of_m(cls, n: int, m: int) -> Self:
        """Put `n` zeros into every group of `m` consecutive inputs, 0 < n < m."""
        if not 0 < n < m:
            raise RacError(
                f'mask_structure "{n}:{m}": prunes {n} of every {m} weights, and N must be at '
                'least 1 and less than M; use "2:4" for half of the weights'
            )
        return cls(sparsity=n / m, n=n, m=m)

    @classmethod
    def parse(cls, mask_structure: str, sparsity: float | None) -> Self:
        """Return the pattern of a recipe: "N:M" (N pruned), or "0:0" with a `sparsity`."""
        match = re.fullmatch(r"([0-9]{1,6}):([0-9]{1,6})", mask_structure)
        n, m = (int(match[1]), int(match[2])) if match else (-1, -1)
        problem = None
        if match is None:
            problem = (
                f'mask_structure {mask_structure!r}: not "N:M"; use "2:4", or "0:0" with a sparsity'
            )
        elif n == m == 0 and sparsity is None:
            problem = 'mask_structure "0:0" with no sparsity: add "sparsity: 0.5"'
        elif m > 0 and 0 < n < m and sparsity is not None:
            problem = (
                f'sparsity: {sparsity} has no effect with mask_structure "{n}:{m}"; leave one out'
            )
        if problem is not None:
            raise RacError(problem)
        return cls.unstructured(sparsity or 0.0) if n == m == 0 else cls.n_of_m(n, m)

    @property
    def is_structured(self) -> bool:
        """Return whether the pattern is N:M."""
        return self.m > 0

    @property
    def mask_structure(self) -> str:
        """Return what a recipe writes: "2:4", or "0:0" for unstructured."""
        return f"{self.n}:{self.m}"

    def describe(self) -> str:
        """Return the pattern in words, for reports."""
        percent = f"{100 * self.sparsity:.4g} %"
        if self.is_structured:
            return f"{self.n} of every {self.m} consecutive input weights are zero ({percent})"
        return (
            f"{percent} of the weights are zero, anywhere"
            if self.sparsity
            else "no weight is pruned"
        )

    def check_shape(self, name: str, rows: int, columns: int) -> None:
        """Refuse a module whose inputs do not divide into groups of M (RacError: naming it)."""
        if self.is_structured and columns % self.m:
            raise RacError(
                f"{name}: weight [{rows}, {columns}] cannot hold {self.mask_structure}, since "
                f'{columns} inputs are no multiple of {self.m}; add "{name}" to ignore'
            )
