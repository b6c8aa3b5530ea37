"""What oneDNN keeps for each new shape of a float32 product: MiB by which this process grows.

    OMP_NUM_THREADS=1 python benchmarks/onednn_code.py                                        # as it is
    ONEDNN_PRIMITIVE_CACHE_CAPACITY=32 OMP_NUM_THREADS=1 python benchmarks/onednn_code.py     # what is never freed

A second's work. rac_modifier/float32_products.py counts with the first figure, on processors where it gives products to oneDNN.
"""

from __future__ import annotations

import ctypes

import torch
from common import machine

from rac_modifier.float32_products import onednn_is_faster, product
from rac_modifier.freed_memory import resident

SHAPES, FIRST = 100, 300


def main() -> None:
    if not onednn_is_faster(torch.device("cpu")):
        raise SystemExit(
            "float32 products do not go to oneDNN on this processor: nothing to measure"
        )
    print(machine())
    x, weight = torch.randn(FIRST + 3 * SHAPES, 512), torch.randn(512, 512)
    product(x, weight)
    for start in range(FIRST, FIRST + 3 * SHAPES, SHAPES):
        ctypes.CDLL(None).malloc_trim(0)
        before = resident()
        for tokens in range(start, start + SHAPES):
            product(x[:tokens], weight)
        ctypes.CDLL(None).malloc_trim(0)
        print(f"{SHAPES} new shapes: {(resident() - before) / SHAPES / 2**20:.2f} MiB each")


if __name__ == "__main__":
    main()
