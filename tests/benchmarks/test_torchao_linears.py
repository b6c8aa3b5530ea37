"""torchao's int4 products are those of its codes."""

from __future__ import annotations

import pytest
import torch

from tests.benchmarks.conftest import BENCHMARKS


def test_torchao_multiplies_its_codes(monkeypatch):
    pytest.importorskip("torchao")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import torchao_linears

    nbytes, milliseconds = torchao_linears.decode_step(
        [(256, 512), (512, 256)], 128, 4
    )  # checks each product
    assert nbytes == 2 * (256 * 512 // 2 + 256 * 512 // 128 * 4)
    assert milliseconds > 0
    monkeypatch.setattr(
        torch.nn.functional, "linear", lambda x, weight: torch.zeros(1, weight.shape[0])
    )
    with pytest.raises(RuntimeError, match=r"torchao: a product \[256, 512\] differs by"):
        torchao_linears.decode_step([(256, 512)], 128, 4)
