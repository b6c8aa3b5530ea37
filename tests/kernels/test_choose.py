"""The one place that chooses a backend."""

from __future__ import annotations

import torch

from rac_modifier.kernels import cpu, cuda
from rac_modifier.kernels.choose import BACKENDS, choose, has_backend, no_backend
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


def test_a_device_without_a_backend_stays_dense():
    decision, chosen = choose(HALF, "xpu")
    assert chosen is None
    assert decision.reason == "dense because there is no sparse kernel for xpu yet"
    assert decision == no_backend("xpu", torch.bfloat16)
    assert not has_backend("xpu")


def test_a_gpu_has_a_backend_where_it_is_asked_for(monkeypatch):
    assert has_backend("cpu")
    assert BACKENDS["cuda"] is cuda
    monkeypatch.delenv("RAC_GPU_KERNELS", raising=False)
    assert not has_backend("cuda")
    decision, chosen = choose(HALF, "cuda")
    assert chosen is None
    assert "RAC_GPU_KERNELS=on" in decision.reason
    assert decision.reason == no_backend("cuda", torch.bfloat16).reason
    monkeypatch.setenv("RAC_GPU_KERNELS", "on")
    assert has_backend("cuda")
