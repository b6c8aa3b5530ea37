"""Loading and launching through cuda-bindings."""

from __future__ import annotations

import importlib

import pytest
import torch
from rac_gpu import driver
from rac_gpu.driver import Module
from rac_gpu.layout import BF16, pack
from rac_gpu.programs import program

from rac_modifier.errors import RacError
from tests.fake_gpu import FakeDriver, Status, code_of
from tests.weights import bf16_weight

ONE = program(BF16, 1, 1)


def test_everything_that_a_launch_needs_is_done_at_load_in_the_devices_context(gpu):
    gpu.contexts.append(0)  # torch's current device is another one
    Module(code_of(BF16), {ONE.name: ONE.shared_bytes, "rac_24_bf16_expand": 0}, 1)
    function = ["cuModuleGetFunction", "cuFuncSetAttribute", "cuFuncLoad"]
    assert gpu.calls == [
        *("cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxPushCurrent"),
        *("cuModuleLoadData", *function, "cuModuleGetFunction", "cuFuncLoad", "cuCtxPopCurrent"),
    ]
    assert gpu.most_shared == {(1, BF16, ONE.name): ONE.shared_bytes}
    assert gpu.contexts == [0]


def test_the_context_is_put_back_where_loading_fails(gpu):
    gpu.refuses = Status.CUDA_ERROR_NO_BINARY_FOR_GPU
    with pytest.raises(
        RacError,
        match="NO_BINARY_FOR_GPU; the driver is older than the NVRTC in use: update the driver",
    ):
        Module(code_of(BF16), {ONE.name: ONE.shared_bytes}, 0)
    assert gpu.contexts == []


def test_a_launch_that_the_driver_refuses_is_an_error(gpu):
    module = Module(code_of(BF16), {ONE.name: ONE.shared_bytes}, 0)
    gpu.most_shared.clear()
    with (
        gpu.on(0),
        pytest.raises(
            RacError,
            match=f"{ONE.name}: cuLaunchKernel: the GPU's driver answers CUDA_ERROR_INVALID_VALUE",
        ),
    ):
        module.launch(ONE.name, (1, 1), 128, 0, (0,) * 9)


def test_a_launch_from_a_thread_that_has_not_used_the_gpu_yet(gpu):
    weight = bf16_weight(16, 64)
    packed, x, out = (
        pack(weight, BF16),
        torch.eye(8, 64).to(torch.bfloat16),
        torch.zeros(8, 16, dtype=torch.bfloat16),
    )
    module = Module(code_of(BF16), {ONE.name: ONE.shared_bytes}, 3)
    gpu.calls.clear()
    arguments = (packed.data_ptr(), x.data_ptr(), 0, out.data_ptr(), 16, 64, 8, 2, 0)
    for _ in range(2):
        module.launch(ONE.name, (1, 1), ONE.threads, 0, arguments)
    assert gpu.calls == ["cuLaunchKernel", "cuCtxSetCurrent", "cuLaunchKernel", "cuLaunchKernel"]
    assert [launch.device for launch in gpu.launches] == [3, 3]
    assert torch.equal(out, weight.dense().T[:8])


class FunctionNotFoundError(RuntimeError):
    """What cuda-bindings raises for a function that the driver does not have."""


def not_found(*arguments: object) -> None:
    raise FunctionNotFoundError("function is not found")


def test_a_driver_without_cufuncload_loads_functions_at_their_first_launch(gpu, monkeypatch):
    monkeypatch.setattr(FakeDriver, "cuFuncLoad", not_found)
    weight, x = bf16_weight(16, 64), torch.eye(8, 64).to(torch.bfloat16)
    packed, out = pack(weight, BF16), torch.zeros(8, 16, dtype=torch.bfloat16)
    module = Module(code_of(BF16), {ONE.name: ONE.shared_bytes}, 0)
    arguments = (packed.data_ptr(), x.data_ptr(), 0, out.data_ptr(), 16, 64, 8, 2, 0)
    with gpu.on(0):
        module.launch(ONE.name, (1, 1), ONE.threads, 0, arguments)
    assert torch.equal(out, weight.dense().T[:8])


@pytest.mark.parametrize(
    "function", ["cuInit", "cuDevicePrimaryCtxRetain", "cuModuleLoadData", "cuModuleGetFunction"]
)
def test_a_missing_driver_or_function_is_said(gpu, monkeypatch, function):
    monkeypatch.setattr(FakeDriver, function, not_found)
    with pytest.raises(
        RacError,
        match=rf"{function} cannot be called \(function is not found\); install or update NVIDIA's",
    ):
        Module(code_of(BF16), {ONE.name: ONE.shared_bytes}, 0)
    assert gpu.contexts == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver")
def test_this_machine_without_a_driver_is_said(monkeypatch):
    """With NVIDIA's own binding: what it raises is turned into an error of ours."""
    pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed")
    with pytest.raises(RacError, match=r"cuInit cannot be called \(.*cuda"):
        Module(b"code", {}, 0)


def test_without_cuda_bindings_the_error_says_how_to_install_them(monkeypatch):
    def missing(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(
        RacError,
        match=r"cuda-bindings cannot be imported \(No module .*\); pip install cuda-bindings",
    ):
        driver.bindings()


def test_the_bindings_have_what_is_used():
    """The package is installed with vLLM for CUDA; importing it needs no driver."""
    pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed")
    found = driver.bindings()
    of_contexts = (
        "cuInit",
        "cuDeviceGet",
        "cuDevicePrimaryCtxRetain",
        "cuCtxPushCurrent",
        "cuCtxPopCurrent",
        "cuCtxSetCurrent",
    )
    of_code = (
        "cuModuleLoadData",
        "cuModuleGetFunction",
        "cuFuncSetAttribute",
        "cuFuncLoad",
        "cuLaunchKernel",
    )
    for name in (*of_contexts, *of_code):
        assert callable(getattr(found, name))
    assert int(found.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) == 8
    numbers = {status.name: int(status) for status in found.CUresult}
    for status in Status:  # of the fake driver
        assert numbers[status.name] == status
    arguments = (tuple(range(len(driver.PARAMETERS))), driver.PARAMETERS)
    if (
        not torch.cuda.is_available()
    ):  # the call ends after its arguments were read, because there is no driver
        with pytest.raises(RuntimeError, match="driver"):
            found.cuLaunchKernel(0, 1, 1, 1, 32, 1, 1, 0, 0, arguments, 0)
