"""The CPU backend: kernels in C++ (csrc/) for AVX2, AVX-VNNI, AVX512, AMX, on ARM for NEON, SDOT, SMMLA, SVE, and portable ones.

The compiled library is searched for at the first use, not at import.
"""

from rac_modifier.kernels.cpu.backend import can_run, linear, pack

__all__ = ["can_run", "linear", "pack"]
