"""The GPU backend: CUDA C++ (csrc/gpu/) for 2:4 weights, and for bfloat16 and int8 of any pattern.

NVRTC compiles it for the card that is there.
Nothing of CUDA is imported or loaded before a layer is decided. Never run on hardware yet: off unless RAC_GPU_KERNELS=on.
"""

from rac_modifier.kernels.cuda.backend import NOT_REQUESTED, VARIABLE, can_run, linear, pack, requested

__all__ = ["NOT_REQUESTED", "VARIABLE", "can_run", "linear", "pack", "requested"]
