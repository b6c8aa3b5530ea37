"""The GPU backend: CUDA C++ (csrc/gpu/) for 2:4 weights and those of any pattern, in bfloat16, int8 and int4.

NVRTC compiles it for the card that is there.
Nothing of CUDA is imported or loaded before a layer is decided. Never run on hardware yet: off unless RAC_GPU_KERNELS=on.
"""

from rac_modifier.kernels.cuda.backend import (
    NOT_REQUESTED,
    VARIABLE,
    can_run,
    linear,
    pack,
    requested,
)

__all__ = ["NOT_REQUESTED", "VARIABLE", "can_run", "linear", "pack", "requested"]
