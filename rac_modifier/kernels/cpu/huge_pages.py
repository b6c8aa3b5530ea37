"""Copies of packed weights in pages of 2 MB, for matmuls that read each weight once per token."""

import mmap

import torch
from torch import Tensor

_CHUNK = 64 << 20  # bytes that are mapped at a time; weights share them, so few bytes pad a page
_ALIGNED = 4096
_ADVICE = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux

_chunk, _used = torch.empty(0, dtype=torch.uint8), 0


def in_huge_pages(data: Tensor) -> Tensor:
    """Return a copy of uint8 [bytes] in memory that Linux is advised to put into huge pages.

    In pages of 4 KB a core waits for the addresses of pages where it reads a weight as fast as
    memory gives it; glibc's own memory is in such pages unless a user sets glibc.malloc.hugetlb.
    A chunk is given back with the last of its weights. Elsewhere than on Linux: `data` itself.
    """
    global _chunk, _used
    if _ADVICE is None or data.numel() == 0:
        return data
    start = -(-_used // _ALIGNED) * _ALIGNED
    if start + data.numel() > len(_chunk):
        size = max(_CHUNK, -(-data.numel() // _ALIGNED) * _ALIGNED)
        memory = mmap.mmap(
            -1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        )  # Linux has another rule for shared memory
        try:
            memory.madvise(_ADVICE)
        except OSError:  # a kernel without them
            return data
        # the tensor keeps the mapping
        _chunk, start = torch.frombuffer(memory, dtype=torch.uint8), 0
    _used = start + data.numel()
    return _chunk[start:_used].copy_(data)
