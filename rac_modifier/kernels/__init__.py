"""Linear layers with packed sparse weights on the CPU, on our own kernels.

`support()` says what runs here, `choose` whether a layer gains from it, `pack` makes a `SparseWeight`, `sparse_linear`
multiplies with one. Importing this loads torch only; the compiled library is looked for at the first use.
"""

from rac_modifier.kernels.choose import Decision, choose
from rac_modifier.kernels.cpu.library import Support, support
from rac_modifier.kernels.cpu.linear import sparse_linear
from rac_modifier.kernels.cpu.packed import SparseWeight, pack, pack_dense, pack_scale, unpack

__all__ = [
    "Decision",
    "SparseWeight",
    "Support",
    "choose",
    "pack",
    "pack_dense",
    "pack_scale",
    "sparse_linear",
    "support",
    "unpack",
]
