"""Loading and launching through cuda-bindings, and the run-time compiler."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from rac_gpu import driver, nvrtc
from rac_gpu.driver import Module

from rac_modifier.errors import RacError

SOURCES = {
    "a.cu": '#include "b.h"\nextern "C" __global__ void k(int* x) { *x = B; }\n',
    "b.h": "#define B 3\n",
}


class Driver:
    """Functions of a driver: 5 is the context of the device."""

    CUfunction_attribute = SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8)

    def __init__(self, refuses: int = 0) -> None:
        self.calls, self.contexts, self.refuses = [], [], refuses

    def __getattr__(self, name: str):
        def call(*arguments):
            self.calls.append(name)
            if name == "cuCtxPushCurrent":
                self.contexts.append(arguments[0])
            if name == "cuCtxPopCurrent":
                self.contexts.pop()
            if name == "cuCtxSetCurrent":
                self.contexts[-1:] = arguments
            if name == "cuModuleLoadData" and self.refuses:
                return self.refuses, None
            return 0, 5 if name == "cuDevicePrimaryCtxRetain" else name

        return call


def test_all_is_loaded_in_the_devices_context_and_a_launch_makes_it_current(monkeypatch):
    fake = Driver()
    monkeypatch.setattr(driver, "bindings", lambda: fake)
    module = Module(b"code", {"kernel": 1024}, 1)
    assert fake.calls[3:5] == ["cuCtxPushCurrent", "cuModuleLoadData"]
    assert fake.calls[5:8] == ["cuModuleGetFunction", "cuFuncSetAttribute", "cuFuncLoad"]
    assert fake.contexts == []
    module.launch("kernel", (1, 1), 128, 0, (0,) * 9)
    assert fake.contexts == [5]


def test_what_the_driver_refuses_is_an_error_and_the_context_is_put_back(monkeypatch):
    fake = Driver(refuses=209)
    monkeypatch.setattr(driver, "bindings", lambda: fake)
    with pytest.raises(RacError, match="209; the driver is older than the NVRTC in use"):
        Module(b"code", {"kernel": 1024}, 0)
    assert fake.contexts == []


def test_nvidias_bindings_have_what_is_used():
    """The package is installed with vLLM for CUDA; importing it needs no driver."""
    pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed")
    found = driver.bindings()
    for name in re.findall(r'"(cu[A-Z]\w+)"', Path(driver.__file__).read_text()):
        assert callable(getattr(found, name))
    assert int(found.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) == 8


def test_a_source_with_a_header_is_compiled_and_an_error_has_the_log():
    try:
        compiler = nvrtc.load()
    except RacError as error:
        pytest.skip(str(error))
    code, _ = compiler.build(SOURCES, "a.cu", ["--gpu-architecture=sm_80"])
    assert code.startswith(b"\x7fELF")
    assert b".text.k" in code
    with pytest.raises(RacError, match=r'a\.cu: NVRTC_ERROR_COMPILATION .*"B" is undefined'):
        compiler.build(SOURCES | {"b.h": ""}, "a.cu", ["--gpu-architecture=sm_80"])
