"""Compiling and loading, once per device and layout."""

from __future__ import annotations

import pytest
from rac_gpu import cache, library, nvrtc
from rac_gpu.layout import BF16, INT4
from rac_gpu.library import Device, compile_options, compiled, module, prepare

from rac_modifier.errors import RacError
from tests.fake_gpu import H100, Status


class FakeCompiler:
    version = (13, 0)

    def __init__(self) -> None:
        self.compiled: list[list[str]] = []

    def build(self, sources, name, options):
        self.compiled.append([name, *options])
        return f"{name} {options}".encode(), ""


def test_each_device_and_layout_is_loaded_once(gpu):
    second = Device(1, (8, 0), 108)
    for _ in range(2):
        assert prepare(H100, BF16) is None
        assert prepare(second, BF16) is None
        assert prepare(H100, INT4[64]) is None
    assert gpu.calls.count("cuModuleLoadData") == 3
    assert module(H100, BF16) is not module(second, BF16)
    assert {device for device, _, _ in gpu.most_shared} == {
        0,
        1,
    }  # each in the context of its device
    assert gpu.contexts == []


def test_what_failed_once_is_not_tried_for_every_layer(gpu):
    gpu.refuses = Status.CUDA_ERROR_NO_BINARY_FOR_GPU
    reasons = {prepare(H100, BF16) for _ in range(3)}
    assert len(reasons) == 1
    assert "NO_BINARY_FOR_GPU" in str(reasons)
    assert gpu.calls.count("cuModuleLoadData") == 1
    with pytest.raises(RacError, match=r"no GPU kernels are loaded on device 0 \(cuModuleLoadData"):
        module(H100, BF16)


def test_what_may_pass_is_tried_again_by_the_next_layer(gpu):
    gpu.refuses = Status.CUDA_ERROR_OUT_OF_MEMORY
    reason = prepare(H100, BF16)
    assert (
        "cuModuleLoadData: the GPU's driver answers CUDA_ERROR_OUT_OF_MEMORY; free some of the GPU's memory"
        in reason
    )
    assert "update the driver" not in reason
    with pytest.raises(RacError, match="no GPU kernels are loaded on device 0"):
        module(H100, BF16)
    gpu.refuses = Status.CUDA_SUCCESS
    assert prepare(H100, BF16) is None
    module(H100, BF16)


def test_compiled_code_is_kept_by_architecture_options_version_and_source(monkeypatch, tmp_path):
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "kept"))
    compiler = FakeCompiler()
    monkeypatch.setattr(nvrtc, "load", lambda: compiler)
    first = compiled("sm_90", BF16)
    assert compiled("sm_90", BF16) == first
    assert compiler.compiled == [["sparse24_bf16.cu", "--gpu-architecture=sm_90", "--std=c++17"]]
    compiled("sm_80", BF16)
    compiled("sm_90", INT4[64])
    compiled("sm_90", INT4[128])
    compiler.version = (13, 1)
    compiled("sm_90", BF16)
    changed = library.read_sources() | {"decode.h": "// changed"}
    monkeypatch.setattr(library, "read_sources", lambda: changed)
    compiled("sm_90", BF16)
    assert len(compiler.compiled) == 6
    assert len(list((tmp_path / "kept").iterdir())) == 6


def test_options_name_the_card_and_the_group():
    assert compile_options(Device(0, (12, 0), 1).architecture, INT4[64]) == [
        "--gpu-architecture=sm_120",
        "--std=c++17",
        "--define-macro=GROUP=64",
        "--define-macro=BF16_SCALES",
    ]


def test_this_machine_without_a_gpu(monkeypatch):
    monkeypatch.setattr(library.torch.cuda, "is_available", lambda: False)
    assert library.current_device() is None
