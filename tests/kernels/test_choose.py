"""The one place that chooses a backend."""

from __future__ import annotations

import pytest
import torch

from rac_modifier.kernels import cpu
from rac_modifier.kernels.choose import BACKENDS, choose, no_backend
from rac_modifier.kernels.cpu import backend
from rac_modifier.kernels.cpu.support import Support
from rac_modifier.kernels.interface import Layer

HALF = Layer(64, 128, 0.5, torch.bfloat16, torch.bfloat16, 128)


def test_the_cpu_has_a_backend_and_it_decides(monkeypatch):
    assert BACKENDS["cpu"] is cpu
    monkeypatch.setattr(backend, "support", lambda: Support("avx2", ""))
    decision, chosen = choose(HALF, "cpu")
    assert decision.sparse
    assert chosen is cpu
    monkeypatch.setattr(backend, "support", lambda: Support(None, "no compiled kernel: a test's"))
    decision, chosen = choose(HALF, "cpu")
    assert decision.reason == "dense because no compiled kernel: a test's"
    assert chosen is None


@pytest.mark.parametrize("device", ["cuda", "xpu"])
def test_a_device_without_a_backend_stays_dense(device):
    decision, chosen = choose(HALF, device)
    assert chosen is None
    assert decision.reason == f"dense because there is no sparse kernel for {device} yet"
    assert decision == no_backend(device, torch.bfloat16)
