"""Tweaks for the CPU that a run computes on: oneDNN's matmuls, and memory that is kept.

docs/results/pruning_time.md and docs/results/scale.md have the measurements.
"""

import ctypes
import functools
import os
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

HEAP_GAPS = 1.15  # pages of a process / bytes of its blocks, whose sizes leave gaps in glibc's heap
_LEAST_WORK = 1 << 26  # multiply-adds below which a call of oneDNN costs more than it gains
_LEAST_ROWS = 256  # rows of the first factor below which copying the second costs too much
_SIZES_PER_DOUBLING = 8  # of the number of tokens
# mallopt's numbers in malloc.h: M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_ARENA_MAX
_MALLOPT = {-3: 256 << 20, -1: 1 << 30, -8: 1}
_MALLOC_VARIABLES = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_ARENA_MAX")
_resident_limit: int | None = None  # bytes; None: no forecast was made
_raise = 0  # bytes


# ---- float32 matmuls by oneDNN instead of MKL: 0.31 instead of 0.51 of the time of SparseGPT


def onednn_is_faster(device: torch.device) -> bool:
    """Return whether float32 matmuls on a device go to oneDNN: on AMD CPUs with AVX-512."""
    return device.type == "cpu" and _is_amd_with_avx512()


@functools.cache
def _is_amd_with_avx512() -> bool:
    has = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    built = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return bool(built and has.get("avx512_f") and str(has.get("cpu_name", "")).startswith("AMD"))


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Return `a` [m, k] @ `b` [k, n]."""
    return _linear_by_onednn(a, b.T) if _onednn_gains(a, b.T) else a @ b


def add_matmul_(
    out: Tensor, a: Tensor, b: Tensor, *, alpha: float = 1.0, chunk: int = 2048
) -> Tensor:
    """Add `alpha` `a` [m, k] @ `b` [k, n] to `out` [m, n] in place, `chunk` rows at a time."""
    if not _onednn_gains(a, b.T):
        return out.addmm_(a, b, alpha=alpha)
    weight = b.T.contiguous()
    for out_rows, a_rows in zip(out.split(chunk), a.split(chunk), strict=True):
        out_rows.add_(_linear_by_onednn(a_rows, weight), alpha=alpha)
    return out


def padded_size(count: int) -> int:
    """Return `count`, rounded up to one of eight sizes per power of two.

    oneDNN keeps 0.57 MiB of code per shape: 8 shapes of an expert layer instead of one per expert.
    """
    step = max((1 << count.bit_length()) // (2 * _SIZES_PER_DOUBLING), 1)
    return -(-count // step) * step


def with_zero_rows(x: Tensor) -> Tensor:
    """Return `x` [rows, k] with zeros appended up to `padded_size(rows)`."""
    missing = padded_size(len(x)) - len(x)
    return torch.nn.functional.pad(x, (0, 0, 0, missing)) if missing else x


class FasterLinears(TorchFunctionMode):
    """Send float32 `linear` without gradients to oneDNN where that is faster."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.linear and not kwargs and not torch.is_grad_enabled():
            x, weight, *bias = args
            plain = all(type(t) in (Tensor, torch.nn.Parameter) for t in (x, weight))
            if plain and _onednn_gains(x, weight):
                tokens = with_zero_rows(x.reshape(-1, x.shape[-1]))
                result = _linear_by_onednn(tokens, weight, *bias)
                return result[: x.shape[:-1].numel()].view(*x.shape[:-1], -1)
        return func(*args, **(kwargs or {}))


def _onednn_gains(x: Tensor, weight: Tensor) -> bool:
    """Return whether oneDNN is faster for `x` [..., k] @ `weight` [n, k]^T."""
    large = x.numel() * weight.shape[0] >= _LEAST_WORK and x.numel() >= _LEAST_ROWS * x.shape[-1]
    return large and x.dtype == weight.dtype == torch.float32 and onednn_is_faster(x.device)


def _linear_by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `x` [..., k] @ `weight` [n, k]^T + `bias`, by the operator of torch's compiler."""
    weight = weight.contiguous()  # oneDNN is a hundred times slower on others
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return result


# ---- freed memory: new pages took a fifth to a third of the time of pruning and of long prompts


def keep_freed_memory() -> bool:
    """Have glibc keep freed blocks, and return whether it does; a user's own settings win."""
    library = ctypes.CDLL(None)
    by_user = any(name in os.environ for name in (*_MALLOC_VARIABLES, "GLIBC_TUNABLES"))
    if by_user or not hasattr(library, "gnu_get_libc_version"):
        return False
    return all(library.mallopt(option, value) == 1 for option, value in _MALLOPT.items())


def expect_growth(forecast: int) -> None:
    """Let this process grow by `forecast` bytes before `return_freed_memory` gives memory back."""
    global _resident_limit, _raise
    _resident_limit, _raise = resident_bytes() + forecast, forecast // 16


def return_freed_memory() -> None:
    """Return what glibc keeps where the process outgrew its forecast (by up to 1.4 times)."""
    global _resident_limit
    if _resident_limit is None or resident_bytes() <= _resident_limit:
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)
        _resident_limit = max(_resident_limit + _raise, resident_bytes())  # new pages cost time


def resident_bytes() -> int:
    """Return the bytes of memory that this process occupies."""
    import psutil  # of the compressing environment

    return int(psutil.Process().memory_info().rss)
