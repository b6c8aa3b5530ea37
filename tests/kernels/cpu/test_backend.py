"""The three functions of the CPU backend, and what they have in common with the compiled kernels."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rac_modifier.checkpoint.stored_weight import StoredWeight, all_stored, from_dense
from rac_modifier.errors import RacError
from rac_modifier.kernels import cpu
from rac_modifier.kernels.cpu import backend
from rac_modifier.kernels.cpu.support import Support, library_and_isa
from rac_modifier.kernels.interface import Decision, Layer
from tests.kernels.cpu.kernel_helpers import random_mask, take

BF16, FP32, FP16 = torch.bfloat16, torch.float32, torch.float16


@pytest.fixture
def avx2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "support", lambda: Support("avx2", "a test's"))


def decide(
    rows: int, columns: int, density: float, stored: torch.dtype, served: torch.dtype | None = None
) -> Decision:
    return cpu.can_run(Layer(rows, columns, density, stored, served or stored, columns))


def test_a_half_sparse_layer_runs_sparse(avx2):
    decision = decide(8960, 1536, 0.5, BF16)
    assert decision.sparse
    assert decision.kernel == "sparse kernel avx2"
    assert decision.bytes_per_weight == 1.125
    assert decision.ceiling == pytest.approx(16 / 9)
    assert decision.reason == (
        "sparse kernel avx2: 1.12 bytes per weight instead of the 2 of dense bfloat16, at most 1.78x faster"
    )
    assert decide(64, 64, 0.5, FP32).bytes_per_weight == 2.125


def test_the_kernel_of_integers_is_named(avx2):
    assert decide(64, 64, 0.5, torch.int8, BF16).kernel == "sparse int8 kernel avx2"
    assert decide(64, 64, 0.5, torch.int32, BF16).kernel == "sparse int4 kernel avx2"
    whole = decide(64, 64, 1.0, torch.int8, BF16)
    assert (whole.kernel, whole.bytes_per_weight, whole.ceiling) == ("int8 kernel avx2", 1.0, 2.0)
    whole = decide(64, 64, 1.0, torch.int32, BF16)
    assert (whole.kernel, whole.bytes_per_weight, whole.ceiling) == ("int4 kernel avx2", 0.5, 4.0)
    for bits in (3, 2):
        few = cpu.can_run(Layer(64, 64, 1.0, torch.int32, BF16, 64, word_bits=bits))
        assert (few.kernel, few.bytes_per_weight) == (f"int{bits} kernel avx2", bits / 8)


@pytest.mark.parametrize(
    ("isa", "stored", "kernel"),
    [
        ("avx512", torch.int8, "sparse int8 kernel avx512 (activations in 8 bits)"),
        ("i8mm", torch.int32, "sparse int4 kernel i8mm (activations in 8 bits)"),
        (
            "avx2",
            torch.int8,
            "sparse int8 kernel avx2 (activations in 16 bits, since it multiplies no bytes)",
        ),
        ("avx512", BF16, "sparse kernel avx512"),
    ],
)
def test_activations_of_8_bits_are_named(isa, stored, kernel, monkeypatch):
    monkeypatch.setattr(backend, "support", lambda: Support(isa, "a test's", isa != "avx2"))
    assert cpu.can_run(Layer(64, 64, 0.5, stored, BF16, 64, activation_bits=8)).kernel == kernel


@pytest.mark.parametrize(
    "name", ["int8", "int4", "dense int4 with zeros", "int3", "bf16", "int8 in groups of 6"]
)
def test_packed_with_the_activation_bits_of_the_weight(best, name):
    """Floats, and integers that are kept as floats, have none."""
    library, isa = library_and_isa()
    for bits in (8, 16):
        data = cpu.pack(replace(WEIGHTS[name], activation_bits=bits), BF16)["weight_packed"]
        expected = (
            0
            if name in ("bf16", "int8 in groups of 6")
            else bits
            if library.kernels[isa].multiplies_bytes
            else 16
        )
        assert library.activation_bits(data, isa) == expected


@pytest.mark.parametrize(
    ("density", "dtype", "support", "reason"),
    [
        (
            0.9,
            BF16,
            Support("avx2", ""),
            "1.93 bytes per weight instead of the 2 of dense bfloat16: at most 1.04x",
        ),
        (0.5, FP16, Support("avx2", ""), "2.12 bytes per weight instead of the 2 of dense float16"),
        (
            0.5,
            BF16,
            Support("portable", ""),
            "slower than a dense product; set RAC_KERNEL=portable",
        ),
        (0.5, BF16, Support(None, "no compiled kernel: why"), "no compiled kernel: why"),
    ],
)
def test_dense_has_its_reason(density, dtype, support, reason, monkeypatch):
    monkeypatch.delenv("RAC_KERNEL", raising=False)
    monkeypatch.setattr(backend, "support", lambda: support)
    decision = decide(1024, 1024, density, dtype)
    assert not decision.sparse
    assert decision.kernel == "dense"
    assert decision.reason.startswith("dense because")
    assert reason in decision.reason


def test_a_dtype_that_no_kernel_reads_stays_dense(avx2):
    assert "no sparse kernel reads torch.float64" in decide(64, 64, 0.5, FP32, torch.float64).reason


def test_the_portable_kernel_can_be_requested(native_path, monkeypatch):
    take(native_path, "portable", monkeypatch)
    assert decide(1024, 1024, 0.5, BF16).sparse


def stored(
    rows: int, columns: int, density: float, dtype: torch.dtype, groups: int | None = None
) -> StoredWeight:
    """A random weight as a checkpoint stores it; `groups` scales per row."""
    mask = random_mask(rows, columns, density)
    generator = torch.Generator().manual_seed(2)
    if groups:
        dense = torch.randint(1, 128, (rows, columns), generator=generator).to(dtype)
        dense *= 1 - 2 * torch.randint(0, 2, dense.shape, generator=generator).to(dtype)
    else:
        dense = torch.randn(rows, columns, generator=generator).to(dtype)
    weight = from_dense(dense.masked_fill(~mask, 0), "layer")
    scale = torch.rand(rows, groups, generator=generator) + 0.1 if groups else None
    return replace(weight, scale=scale)


def four_bit(
    rows: int, columns: int, density: float, groups: int, asymmetric: bool = False, bits: int = 4
) -> StoredWeight:
    """A random weight of values of `bits`, of a sparse one no zeros among those that are stored."""
    generator = torch.Generator().manual_seed(3)
    dense = torch.randint(0, 1 << bits, (rows, columns), dtype=torch.int8, generator=generator)
    zeros = torch.full((rows, groups), 1 << (bits - 1), dtype=torch.uint8)
    if asymmetric:
        zeros.random_(1 << bits, generator=generator)
    dense -= zeros.to(torch.int8).repeat_interleave(columns // groups, dim=1)
    scale = (torch.rand(rows, groups, generator=generator) + 0.1).bfloat16().float()
    if density < 1.0:
        dense = dense.masked_fill(~random_mask(rows, columns, density), 0)
    weight = all_stored(dense, "layer") if density == 1.0 else from_dense(dense, "layer")
    return replace(weight, scale=scale, bits=bits, zeros=zeros if asymmetric else None)


WEIGHTS = {
    "bf16": stored(37, 100, 0.5, BF16),
    "fp32": stored(37, 100, 0.5, FP32),
    "fp16": stored(37, 100, 0.3, FP16),
    "int8": stored(37, 100, 0.5, torch.int8, 1),
    "int8 in groups": stored(37, 96, 0.5, torch.int8, 3),
    "int8 in groups of 6": stored(37, 96, 0.5, torch.int8, 16),
    "int4": four_bit(37, 100, 0.5, 1),
    "int4 in groups": four_bit(37, 96, 0.5, 3),
    "int4 with zeros": four_bit(37, 96, 0.5, 3, True),
    "dense int4 with zeros": four_bit(37, 96, 1.0, 3, True),
    "int4 in groups of 1040": four_bit(37, 2080, 0.5, 2, True),
    "int4 in groups of 12": four_bit(37, 96, 0.5, 8, True),
    "int3": four_bit(37, 100, 1.0, 1, bits=3),
    "int3 in groups": four_bit(37, 96, 1.0, 3, bits=3),
    "int3 in groups of 544": four_bit(37, 1088, 1.0, 2, True, 3),
    "int3 in groups of 24": four_bit(37, 96, 1.0, 4, True, 3),
    "int3 in groups of 6": four_bit(37, 96, 1.0, 16, True, 3),
    "int2 with zeros": four_bit(37, 96, 1.0, 3, True, 2),
    "int2 in groups of 12": four_bit(37, 96, 1.0, 8, True, 2),
}


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("served", [FP32, BF16, FP16], ids=str)
def test_packed_and_multiplied_as_the_dense_weight(best, name, served):
    weight = WEIGHTS[name]
    packed = cpu.pack(weight, served)
    assert set(packed) <= {"weight_packed", "weight_packed_scale"}
    x = torch.randn(2, 3, weight.columns).to(served)
    bias = torch.randn(weight.rows).to(served)
    y = cpu.linear(x, packed, weight.rows, weight.columns, bias)
    assert (y.dtype, y.shape) == (served, (2, 3, weight.rows))
    expected = torch.nn.functional.linear(
        x.double(), weight.dequantized(torch.float64), bias.double()
    )
    # Values in groups of 6, and float32 values that are served in bfloat16, are rounded to bfloat16.
    rounded = served != FP32 or name.endswith("groups of 6")
    bound = (2.0**-7 if rounded else 1e-4) * (
        x.double().abs() @ weight.dequantized(torch.float64).abs().T + 1
    )
    assert bool(((y.double() - expected).abs() <= bound).all())


def test_the_bytes_that_are_announced_are_those_that_are_packed(best):
    for weight, served in (
        (stored(100, 1000, 0.4, BF16), BF16),
        (stored(100, 1000, 0.4, FP16), FP16),
        (stored(100, 1000, 0.4, torch.int8, 1), BF16),
        (stored(100, 1000, 1.0, torch.int8, 1), BF16),
    ):
        announced = (
            cpu.can_run(Layer.of(weight, served)).bytes_per_weight * weight.rows * weight.columns
        )
        header = 64 + 8 * 8 + 64 + 128  # header, offsets and padding
        assert announced == pytest.approx(
            cpu.pack(weight, served)["weight_packed"].numel(), abs=header
        )
    for four, group_bits in (
        (four_bit(160, 1024, 0.5, 8), 16 / 128),
        (four_bit(160, 1024, 0.5, 8, True), 24 / 128),
        (four_bit(160, 1024, 1.0, 32), 16 / 32),
        (four_bit(160, 1024, 1.0, 16, bits=3), 16 / 64),
        (four_bit(160, 1024, 1.0, 8, True, 2), 24 / 128),
        (stored(160, 1024, 0.5, torch.int8, 8), 32 / 128),
    ):
        announced = cpu.can_run(Layer.of(four, BF16)).bytes_per_weight
        nbytes = sum(tensor.nbytes for tensor in cpu.pack(four, BF16).values())
        assert announced * four.rows * four.columns == pytest.approx(nbytes, abs=512)
        bits = four.bits * four.density + (four.density < 1) + group_bits
        assert announced == pytest.approx(bits / 8, rel=0.015)


def test_integers_that_are_all_stored_need_no_masks(best):
    weight = stored(32, 64, 1.0, torch.int8, 1)
    assert cpu.pack(weight, FP32)["weight_packed"].numel() == 64 + 64 + 32 * 64 + 64


def test_what_no_kernel_reads_is_refused(best):
    with pytest.raises(RacError, match=r"values of torch\.float64: .*keep it dense"):
        cpu.pack(WEIGHTS["fp32"], torch.float64)


def test_compiled_with_float16(best):
    weight = WEIGHTS["bf16"]
    packed = cpu.pack(weight, FP16)
    step = torch.compile(
        lambda x: cpu.linear(x, packed, 37, 100), fullgraph=True, backend="aot_eager"
    )
    x = torch.randn(2, 100).half()
    assert torch.equal(step(x), cpu.linear(x, packed, 37, 100))
