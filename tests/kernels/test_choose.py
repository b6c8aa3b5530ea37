"""The one place that chooses a backend: built in, from an entry point, or none with the reason."""

from __future__ import annotations

from importlib.metadata import EntryPoint, EntryPoints

import pytest
import torch

from rac_modifier.kernels import choose as choose_module
from rac_modifier.kernels import cpu
from rac_modifier.kernels.choose import BACKENDS, backend_of, choose
from rac_modifier.kernels.cpu import backend
from rac_modifier.kernels.cpu.support import Support
from rac_modifier.kernels.interface import Layer
from tests.kernels import fake_backend

HALF = Layer(64, 128, 0.5, torch.bfloat16, torch.bfloat16, 128)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch):
    """Entry points of installed packages: device type to module."""

    def install(**modules: str) -> None:
        points = [EntryPoint(n, m, choose_module.GROUP) for n, m in modules.items()]
        monkeypatch.setattr(
            choose_module, "entry_points", lambda **keys: EntryPoints(points).select(**keys)
        )
        choose_module._from_entry_point.cache_clear()

    yield install
    choose_module._from_entry_point.cache_clear()


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
    assert decision.reason == "dense because there is no sparse kernel for xpu"
    assert isinstance(backend_of("xpu"), str)


def test_an_installed_package_brings_a_backend(installed):
    installed(xpu="tests.kernels.fake_backend")
    assert choose(HALF, "xpu")[1] is fake_backend
    assert not isinstance(backend_of("xpu"), str)
    assert isinstance(backend_of("cuda"), str)


def test_a_backend_that_cannot_be_imported_is_the_reason(installed):
    installed(xpu="tests.kernels.no_such_module")
    decision, chosen = choose(HALF, "xpu")
    assert chosen is None
    assert decision.reason.startswith(
        "dense because the backend of tests.kernels.no_such_module cannot be imported"
        " (ModuleNotFoundError: No module"
    )
