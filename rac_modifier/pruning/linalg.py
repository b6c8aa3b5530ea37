"""Linear algebra that the solvers share: dampening, the factor, slices, quadratic forms."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self, TypeVar

import torch
from torch import Tensor

from rac_modifier.errors import RacError
from rac_modifier.pruning.cholesky import cholesky_, cholesky_solve
from rac_modifier.runtime.cpu_tuning import add_matmul_, matmul

# Each retry multiplies the dampening by ten, up to the mean of the diagonal. With more, H would
# hardly matter, and the result would be magnitude pruning under another name.
MAX_DAMPENING = 1.0
_FIRST_RETRY = 1e-4  # when dampening_frac is 0
# Of quadratic_form: rows of H, inputs per sum, vectors per block.
BLOCK, _SUMMED, VECTORS = 512, 2048, 1024
_ROW_BLOCK = 256  # rows of a matmul that is added to a matrix; bounds its temporary memory
# Numbers of a slice that stays in the caches of a CPU; on a GPU calls take longer, so more.
CACHED_ON_CPU, _CACHED_ON_GPU = 1 << 17, 1 << 22

T = TypeVar("T")


@dataclass(frozen=True)
class Dampening:
    """What is added to the diagonal of a Hessian [d, d]: lambda = `frac` * mean(diag H)."""

    frac: float
    retries: int  # how often `frac` was raised
    uniform: Tensor  # lambda, one number
    added: Tensor  # [d], lambda, and the mean on top of it for inputs that are 0 on every token
    diagonal: Tensor  # [d], the damped diagonal; it is positive everywhere

    @classmethod
    def of(cls, hessian: Tensor, frac: float, retries: int = 0) -> Self:
        """Dampen a Hessian whose diagonal is nowhere negative and somewhere positive."""
        diagonal = hessian.diagonal()
        mean = diagonal.mean()
        # lambda; a dead input gets the mean too, so that even without lambda H' has a factor
        uniform = frac * mean
        added = torch.where(diagonal == 0, mean, torch.zeros_like(mean)) + uniform
        return cls(frac, retries, uniform, added, diagonal + added)

    @property
    def larger(self) -> str:
        """Return the next step for results that overflow."""
        return f"raise dampening_frac ({self.frac:.4g})"

    def raise_until(
        self, attempt: Callable[[Self], T | None], hessian: Tensor, label: str
    ) -> tuple[T, Self]:
        """Return the result of `attempt` and its dampening, raised tenfold while that is None."""
        dampening = self
        while (result := attempt(dampening)) is None:
            larger = max(dampening.frac * 10, _FIRST_RETRY)  # lambda <- 10 lambda
            if larger > MAX_DAMPENING * (1 + 1e-9):
                raise RacError(
                    f"{label}: the Hessian is not positive definite, even with dampening_frac "
                    f"{dampening.frac:.4g}; use more calibration tokens, or look for overflows"
                )
            dampening = self.of(hessian, larger, dampening.retries + 1)
        return result, dampening


@dataclass(frozen=True)
class Factor:
    """The damped Hessian as U U^T, with U [d, d] upper triangular and U^-1 = R: H^-1 = R^T R.

    U is the Cholesky factor of the matrix read from the last input to the first:
    U[i, j] = `reversed_lower`[d-1-i, d-1-j], lower triangular. With an `order` [d], input i of U is
    input order[i] of H.
    """

    reversed_lower: Tensor
    dampening: Dampening
    order: Tensor | None = None

    def solve(self, b: Tensor) -> Tensor:
        """Return `b` [rows, d] times the inverse of the damped Hessian."""
        # b H'^-1 = (H'^-1 b^T)^T, and L L^T is H' with the inputs read backwards
        if self.order is None:
            return cholesky_solve(b.T.flip(0), self.reversed_lower).flip(0).T
        back = self.order.flip(0)
        solved = torch.empty_like(b)
        solved[:, back] = cholesky_solve(b.T[back], self.reversed_lower).T
        return solved

    @classmethod
    def of(
        cls, hessian: Tensor, dampening: Dampening, label: str, *, largest_first: bool = False
    ) -> Self:
        """Factor H with this dampening, or a larger one where it needs it (RacError: `label`).

        `largest_first` orders the inputs by the diagonal of H, falling.
        """
        order = dampening.diagonal.argsort(descending=True, stable=True) if largest_first else None
        inputs = torch.arange(len(hessian), device=hessian.device) if order is None else order
        back = inputs.flip(0)

        def attempt(dampening: Dampening) -> Tensor | None:
            damped = hessian[back.unsqueeze(1), back]
            damped.diagonal().copy_(dampening.diagonal[back])
            return cholesky_(damped)

        return cls(*dampening.raise_until(attempt, hessian, label), order)

    @staticmethod
    def diagonal_blocks(reversed_lower: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Return the diagonal blocks of U and R at inputs [start, stop), of factors [..., d, d]."""
        d = reversed_lower.shape[-1]
        block = slice(d - stop, d - start)
        u = reversed_lower[..., block, block].flip(-2, -1)  # back to the order of the inputs
        identity = torch.eye(stop - start).to(u).expand_as(u)
        # R = U^-1 is triangular too, so its diagonal block is the inverse of the block of U
        return u, torch.linalg.solve_triangular(u, identity, upper=True)


def check_finite(x: Tensor, name: str, what: str, step: str) -> None:
    """Refuse values of a module that are not finite, with the next step (RacError)."""
    # a finite sum proves it in one pass, but a sum can overflow
    if not (bool(x.sum().isfinite()) or bool(x.isfinite().all())):
        raise RacError(f"{name}: the {what} is not finite everywhere; {step}")


def bf16_is_fast(device: torch.device) -> bool:
    """Return whether the device has units for bfloat16 matmuls that are summed in float32.

    CPUs with AVX512-BF16 or AMX (4.3 times float32 on a Zen 5), and CUDA from capability 8.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    has_table = device.type == "cpu" and hasattr(torch.cpu, "get_capabilities")
    has = torch.cpu.get_capabilities() if has_table else {}
    return bool(has.get("avx512_bf16") or has.get("amx_bf16"))


def cached_slices(matrix: Tensor, group: int = 1) -> list[slice]:
    """Cut the rows of `matrix` into whole groups of `group` rows that stay in the caches."""
    size = CACHED_ON_CPU if matrix.device.type == "cpu" else _CACHED_ON_GPU
    return _slices(len(matrix), max(size // max(matrix.shape[1], 1) // group * group, group))


def row_blocks(matrix: Tensor) -> list[slice]:
    """Cut the rows of a matmul that is added to `matrix`."""
    return _slices(len(matrix), _ROW_BLOCK)


def _slices(length: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def quadratic_form(vectors: Tensor, hessian: Tensor, *, bf16: bool = False) -> Tensor:
    """Return v^T H v for each column v of `vectors` [d, rows], H [d, d]; float64 [rows].

    Uses the lower triangle and counts twice what is left of the diagonal blocks: half the work of
    H v. `bf16` rounds the factors of H v where there are 1024 inputs or more.
    """
    result = torch.zeros(vectors.shape[1], dtype=torch.float64, device=vectors.device)
    bf16 = bf16 and len(hessian) >= 2 * BLOCK
    for columns, sums in zip(vectors.split(VECTORS, dim=1), result.split(VECTORS), strict=True):
        rows = columns.T.contiguous()
        rounded = rows.bfloat16() if bf16 else rows
        for start in range(0, len(hessian), BLOCK):
            block, leading = slice(start, start + BLOCK), slice(0, start + BLOCK)
            # v^T H v = sum_B v_B^T (H_BB v_B + 2 H_B,before v_before)
            if bf16:
                weight = hessian[block, leading].bfloat16()
                weight[:, :start] *= 2  # exact
                image = (rounded[:, leading] @ weight.T).float()
            else:
                image = matmul(rows[:, block], hessian[block, block])
                for first in range(0, start, _SUMMED):
                    before = slice(first, min(first + _SUMMED, start))
                    add_matmul_(image, rows[:, before], hessian[block, before].T, alpha=2)
            sums += image.mul_(rows[:, block]).sum(1)
    return result


def stacked(weights: Sequence[Tensor], hessian: Tensor) -> Tensor:
    """Transpose weights [rows_i, d] to [d, sum(rows)], in the Hessian's dtype and device."""
    result = hessian.new_empty(hessian.shape[0], sum(w.shape[0] for w in weights))
    for part, w in zip(result.split([w.shape[0] for w in weights], dim=1), weights, strict=True):
        part.copy_(w.T)
    return result
