"""The three functions of the GPU backend: decisions with their reasons, and products end to end on the fake GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import rac_gpu
import torch
from rac_gpu import backend, library
from rac_gpu.library import Device

from rac_modifier.errors import RacError
from rac_modifier.formats.stored_weight import StoredWeight
from rac_modifier.kernels.interface import Layer
from tests.fake_gpu import FakeDriver, Status
from tests.weights import (
    assert_product,
    bf16_weight,
    fp8_weight,
    grouped_weight,
    int4_any_weight,
    int4_weight,
    int8_weight,
    kept_of_four,
    unstructured_weight,
)

BF16 = torch.bfloat16
HALF = Layer(4096, 4096, 0.5, BF16, BF16, 4096, two_of_four=True)
EIGHT_BITS = replace(HALF, stored=torch.int8)
FOUR_BITS = replace(HALF, stored=torch.int32, group=128, group_bytes=2)
FP8 = replace(HALF, stored=torch.float8_e4m3fn)


def int8_24_weight(rows: int, columns: int):
    return int8_weight(rows, columns, kept_of_four(rows, columns).float())


ANY = replace(HALF, two_of_four=False)


@pytest.mark.parametrize(
    ("layer", "kernel", "size"),
    [
        (HALF, "2:4", 1.125),
        (FOUR_BITS, "2:4 int4", 0.390625),
        (replace(FOUR_BITS, group_bytes=4), "2:4 int4 with fp32 scales", 0.40625),
        (EIGHT_BITS, "2:4 int8", 0.625 + 4 / 4096),
        (FP8, "2:4 fp8", 0.625 + 4 / 4096),
        (replace(EIGHT_BITS, group=128), "2:4 int8", 0.65625),
        (replace(FP8, group=64), "2:4 fp8", 0.6875),
        (replace(FP8, group=192), "2:4 fp8", 0.6875),
    ],
)
def test_it_says_that_it_was_not_measured(gpu, layer, kernel, size):
    decision = rac_gpu.can_run(layer)
    assert decision.sparse
    assert decision.kernel == f"sparse GPU kernel {kernel}"
    assert "never run on a GPU" in decision.reason
    assert (decision.bytes_per_weight, decision.dense_bytes) == (size, 2.0)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (
            replace(HALF, served=torch.float16),
            "it is served in torch.float16; the GPU kernels multiply bfloat16",
        ),
        (
            replace(FOUR_BITS, two_of_four=False, group=96),
            "there is no GPU kernel for int4 in groups of 96; the kernels take bfloat16, and int8, float8_e4m3fn and int4 "
            "with one scale per row or in groups of a multiple of 64",
        ),
        (replace(FOUR_BITS, density=1.0, word_bits=3), "there is no GPU kernel for int3"),
        (
            replace(ANY, stored=torch.int8, group=96),
            "there is no GPU kernel for int8 in groups of 96; the kernels",
        ),
        (
            replace(ANY, stored=torch.int8, zero_points=True),
            "its values have zero points; the GPU kernels take symmetric",
        ),
        (
            replace(ANY, stored=torch.int8, columns=70400, group=70400),
            "its 70400 columns are more than the 65536",
        ),
        (
            replace(ANY, density=0.9),
            r"packed it takes about 2.01 bytes per weight instead of 2: at most 1.00x faster",
        ),
        (
            replace(ANY, columns=70400),
            "its 70400 columns are more than the 65536 of the GPU kernel for any pattern",
        ),
        (
            replace(ANY, served=torch.float16),
            "it is served in torch.float16; the GPU kernels multiply bfloat16",
        ),
        (
            replace(FOUR_BITS, zero_points=True),
            "its values have zero points; the GPU kernels take symmetric int4 and int8",
        ),
        (replace(FOUR_BITS, group=32), "there is no GPU kernel for int4 in groups of 32"),
        (
            replace(HALF, stored=torch.int8, group=32),
            "there is no GPU kernel for int8 in groups of 32",
        ),
        (
            replace(HALF, stored=torch.float8_e5m2),
            "there is no GPU kernel for float8_e5m2; the kernels take",
        ),
        (replace(FP8, group=32), "there is no GPU kernel for float8_e4m3fn in groups of 32"),
        (
            replace(FP8, served=torch.float16),
            "it is served in torch.float16; the GPU kernels multiply bfloat16",
        ),
        (replace(HALF, columns=100), "its 100 columns are no multiple of 8"),
    ],
)
def test_dense_has_its_reason(gpu, layer, reason):
    decision = rac_gpu.can_run(layer)
    assert not decision.sparse
    assert decision.kernel == "dense"
    assert decision.reason.startswith(f"dense because {reason}")
    assert gpu.calls == []


@pytest.mark.parametrize(
    ("device", "reason"),
    [
        (None, "torch finds no CUDA device"),
        (Device(0, (7, 5), 40), "sm_75 has no cp.async and no mma.sp; sm_80 is the first that has"),
    ],
)
def test_a_device_that_cannot(gpu, monkeypatch, device, reason):
    monkeypatch.setattr(library, "current_device", lambda: device)
    assert rac_gpu.can_run(HALF).reason == f"dense because {reason}"


def test_what_does_not_load_stays_dense(gpu):
    gpu.refuses = Status.CUDA_ERROR_NO_BINARY_FOR_GPU
    reason = rac_gpu.can_run(HALF).reason
    assert reason.startswith(
        "dense because cuModuleLoadData: the GPU's driver answers CUDA_ERROR_NO_BINARY_FOR_GPU"
    )
    with pytest.raises(RacError, match="layer: cuModuleLoadData"):
        rac_gpu.pack(bf16_weight(16, 64), BF16)


@pytest.mark.parametrize("tokens", [1, 9, 40, 257])
@pytest.mark.parametrize(
    "make",
    [
        bf16_weight,
        lambda rows, columns: int4_weight(rows, columns, 64),
        lambda rows, columns: int4_weight(rows, columns, 64, scales=torch.float16),
        unstructured_weight,
        int8_weight,
        lambda rows, columns: int4_any_weight(64, rows, columns),
        int8_24_weight,
        lambda rows, columns: grouped_weight(
            int8_weight, 64, rows, columns, kept_of_four(rows, columns).float()
        ),
        lambda rows, columns: grouped_weight(fp8_weight, 64, rows, columns, 0.4),
        lambda rows, columns: fp8_weight(rows, columns, kept_of_four(rows, columns).float()),
    ],
    ids=[
        "bf16",
        "int4",
        "int4 with scales of float16",
        "unstructured",
        "unstructured int8",
        "unstructured int4",
        "int8",
        "int8 in groups",
        "unstructured fp8 in groups",
        "fp8",
    ],
)
def test_packed_and_multiplied_as_the_dense_weight(gpu: FakeDriver, make, tokens):
    weight = make(50, 192)
    check_product(weight, tokens)


def test_without_a_driver_or_a_function_of_it_a_layer_stays_dense_with_the_reason(gpu, monkeypatch):
    """`cuda-bindings` has every name, and raises RuntimeErrors of its own at the call."""

    def missing(*arguments: object) -> None:
        raise RuntimeError(
            '"cuda" is an NVIDIA driver library and can only be found via system search'
        )

    monkeypatch.setattr(FakeDriver, "cuInit", missing)
    decision = rac_gpu.can_run(HALF)
    assert not decision.sparse
    assert decision.reason == (
        'dense because cuInit cannot be called ("cuda" is an NVIDIA driver library and can only be found via system search); '
        "install or update NVIDIA's driver, and see that `nvidia-smi` lists the GPU"
    )
    with pytest.raises(RacError, match="layer: cuInit cannot be called"):
        rac_gpu.pack(bf16_weight(16, 64), BF16)


def check_product(weight: StoredWeight, tokens: int) -> None:
    packed = rac_gpu.pack(weight, BF16)
    x, bias = torch.randn(tokens, 192).to(BF16), torch.randn(50).to(BF16)
    y = rac_gpu.linear(x, packed, 50, 192, bias)
    assert y.dtype == BF16
    dense = weight.dequantized(BF16 if tokens >= 129 else torch.float64)  # expanded, it is rounded
    assert_product(y, x, dense.double(), bias)
    assert rac_gpu.linear(x.view(1, tokens, 192), packed, 50, 192).shape == (1, tokens, 50)


def test_what_no_kernel_reads_is_refused(gpu):
    with pytest.raises(
        RacError, match=r"layer: torch\.bfloat16 served in torch\.float16 has no GPU kernel here"
    ):
        rac_gpu.pack(bf16_weight(16, 64), torch.float16)


def test_too_little_memory_is_said(gpu, monkeypatch):
    def full(device: Device) -> torch.device:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(backend, "torch_device", full)
    with pytest.raises(
        RacError, match=r"layer: 9 MB do not fit into the GPU's memory .*--tensor-parallel-size"
    ):
        rac_gpu.pack(bf16_weight(2048, 4096), BF16)


def test_under_torch_compile(gpu):
    weight = bf16_weight(32, 128)
    packed = rac_gpu.pack(weight, BF16)
    step = torch.compile(
        lambda x: rac_gpu.linear(x, packed, 32, 128) * 2, fullgraph=True, backend="aot_eager"
    )
    x = torch.randn(3, 128).to(BF16)
    assert torch.equal(step(x), rac_gpu.linear(x, packed, 32, 128) * 2)
