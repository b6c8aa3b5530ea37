"""The CPU backend: kernels in C++ (csrc/), a set per instruction set.

The compiled library is searched for at the first use, not at import.
"""

from rac_modifier.kernels.cpu.backend import can_run, linear, pack

__all__ = ["can_run", "linear", "pack"]
