"""Whether a layer runs on the sparse kernel, as a value with its reason."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from rac_modifier.errors import RacError
from rac_modifier.kernels.cpu.library import Support
from rac_modifier.kernels.cpu.library import support as find_support

_WORD_BYTES = 4  # a mask of 16 rows x 2 columns
_LEAST_CEILING = 1.1  # below, a kernel that is not perfect loses


@dataclass(frozen=True)
class Decision:
    """What a layer [rows, columns] gets: `kernel` is "sparse kernel avx2", say, or "dense".

    bytes_per_weight: of the packed layout, masks and padding included. ceiling: dense bytes over packed bytes, the
    largest gain that reading fewer bytes can give. Both also where the decision is dense.
    """

    sparse: bool
    kernel: str
    reason: str
    bytes_per_weight: float
    ceiling: float


def choose(
    rows: int,
    columns: int,
    density: float,
    dtype: torch.dtype,
    support: Support | None = None,
    note: str = "",
    served: torch.dtype | None = None,
) -> Decision:
    """Decide for a weight [rows, columns] of which the share `density` is stored, in the dtype that it is packed in.

    It is compared with a dense weight in the dtype that is `served`; where that is not said, int8 with bfloat16 and
    others with themselves. `support` defaults to this machine's; `note` is added to the kernel's name. Raise RacError
    for a shape or density that there cannot be.
    """
    if rows < 1 or columns < 1 or not 0.0 <= density <= 1.0:
        raise RacError(
            f"a weight [{rows}, {columns}] of density {density}: sizes are positive, the density within 0..1"
        )
    support = support or find_support()
    packed = 4 if dtype == torch.float16 else dtype.itemsize  # float16 is packed as float32, exactly
    masks = -(-rows // 16) * -(-columns // 32) * 16 * _WORD_BYTES
    bytes_per_weight = packed * density + masks / (rows * columns)
    dense = (served or (torch.bfloat16 if dtype == torch.int8 else dtype)).itemsize
    ceiling = dense / bytes_per_weight

    def decision(kernel: str | None, reason: str) -> Decision:
        return Decision(kernel is not None, kernel or "dense", reason, bytes_per_weight, ceiling)

    if support.isa is None:
        return decision(None, f"dense because {support.reason}")
    if dtype not in (torch.bfloat16, torch.float32, torch.float16, torch.int8):
        return decision(None, f"dense because no sparse kernel reads {dtype}")
    if ceiling < _LEAST_CEILING:
        return decision(
            None,
            f"dense because packed it takes {bytes_per_weight:.2f} bytes a weight instead of {dense}: "
            f"at most {ceiling:.2f}x to gain",
        )
    if support.isa == "portable" and os.environ.get("RAC_KERNEL") != "portable":
        return decision(
            None,
            "dense because this processor has neither AVX2 nor AVX512 and the portable kernel is slower than a dense "
            "product; RAC_KERNEL=portable takes it nevertheless",
        )
    kernel = f"sparse {'int8 ' if dtype == torch.int8 else ''}kernel {support.isa}{note and f' ({note})'}"
    return decision(
        kernel, f"{kernel}: {bytes_per_weight:.2f} bytes a weight instead of {dense}, at most {ceiling:.2f}x"
    )
