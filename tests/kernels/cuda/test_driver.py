"""Loading and launching through cuda-bindings."""

from __future__ import annotations

import importlib

import pytest
import torch

from rac_modifier.errors import RacError
from rac_modifier.kernels.cuda import driver
from rac_modifier.kernels.cuda.driver import Module
from rac_modifier.kernels.cuda.layout import BF16
from rac_modifier.kernels.cuda.programs import program
from tests.kernels.cuda.fake_gpu import code_of

ONE = program(BF16, 1, 1)


def test_everything_that_a_launch_needs_is_done_at_load(gpu):
    Module(code_of(BF16), {ONE.name: ONE.shared_bytes, "rac_24_bf16_expand": 0})
    function = ["cuModuleGetFunction", "cuFuncSetAttribute", "cuFuncLoad"]
    assert gpu.calls == ["cuModuleLoadData", *function, "cuModuleGetFunction", "cuFuncLoad"]
    assert {name: size for (_, name), size in gpu.most_shared.items()} == {ONE.name: ONE.shared_bytes}


def test_a_launch_that_the_driver_refuses_is_an_error(gpu):
    module = Module(code_of(BF16), {ONE.name: ONE.shared_bytes})
    gpu.most_shared.clear()
    with pytest.raises(RacError, match=f"{ONE.name}: the GPU's driver answers CUDA_ERROR_INVALID_VALUE"):
        module.launch(ONE.name, (1, 1), 128, 0, (0,) * 9)


def test_without_cuda_bindings_the_error_says_how_to_install_them(monkeypatch):
    def missing(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(RacError, match=r"cuda-bindings cannot be imported \(No module .*\); pip install cuda-bindings"):
        driver.bindings()


def test_the_bindings_have_what_is_used():
    """The package is installed with vLLM for CUDA; importing it needs no driver."""
    pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed")
    found = driver.bindings()
    for name in ("cuModuleLoadData", "cuModuleGetFunction", "cuFuncSetAttribute", "cuFuncLoad", "cuLaunchKernel"):
        assert callable(getattr(found, name))
    assert int(found.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) == 8
    arguments = (tuple(range(len(driver.PARAMETERS))), driver.PARAMETERS)
    if not torch.cuda.is_available():  # the call ends after its arguments were read, because there is no driver
        with pytest.raises(RuntimeError, match="driver"):
            found.cuLaunchKernel(0, 1, 1, 1, 32, 1, 1, 0, 0, arguments, 0)
