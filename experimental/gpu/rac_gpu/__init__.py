"""A sparse CUDA kernel, a backend of rac_modifier that never ran on a GPU.

CUDA C++ (source/) for 2:4 weights of int4. NVRTC compiles it for the card while weights load.
"""

from rac_gpu.backend import can_run, linear, pack

__all__ = ["can_run", "linear", "pack"]
