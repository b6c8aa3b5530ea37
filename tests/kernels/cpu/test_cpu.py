"""The CPU backend: encodings, decisions, and packing compared with the dense weight."""

import re
from dataclasses import replace

import pytest
import torch

from rac_modifier.errors import RacError
from rac_modifier.formats.encoding import Encoding
from rac_modifier.formats.stored_weight import StoredWeight, all_stored, from_dense
from rac_modifier.kernels import cpu
from rac_modifier.kernels.cpu import packed_type
from rac_modifier.kernels.cpu.support import Support
from rac_modifier.kernels.interface import Layer
from tests.kernels.cpu.kernel_helpers import random_mask, take

BF16, FP32, FP16, INT8 = torch.bfloat16, torch.float32, torch.float16, torch.int8
HALF = Layer(64, 64, 0.5, Encoding("bfloat", 16), BF16)
CODES = Layer(64, 64, 1.0, Encoding("int", 8), BF16)
AVX2 = Support("avx2", "")


@pytest.mark.parametrize(
    ("encoding", "density", "dtype", "bits", "note"),
    [
        (("bfloat", 16), 0.5, BF16, 16, ""),  # also where it is served in float32
        (("float", 32), 0.5, FP32, 32, ""),
        (("int", 8), 0.5, INT8, 8, ""),
        (("int", 8, 32), 1.0, INT8, 8, ""),
        (("int", 4), 0.5, INT8, 4, ""),
        (("int", 4, 8), 1.0, INT8, 4, ""),
        (("int", 4, 12), 0.5, INT8, 8, "int4 values in groups of 12, one byte each"),
        (("int", 3, 32), 1.0, INT8, 3, ""),
        (("int", 2), 1.0, INT8, 2, ""),
        (("int", 3, 24), 1.0, INT8, 4, "int3 values in groups of 24, four bits each"),
        (("int", 2, 12), 1.0, INT8, 8, "int2 values in groups of 12, one byte each"),
        (("float", 8), 0.5, BF16, 16, "fp8 values as bfloat16, exactly"),
    ],
    ids=str,
)
def test_packed_types(encoding, density, dtype, bits, note):
    layer = Layer(64, 96, density, Encoding(*encoding), FP32)
    packed, said = packed_type(layer)
    masked = density < 1
    assert (packed.dtype, packed.bits, packed.masked, said) == (dtype, bits, masked, note)


@pytest.mark.parametrize(
    ("layer", "support", "says"),
    [
        (HALF, AVX2, "^sparse kernel avx2: 1.12 bytes per weight instead of the 2 of dense "
                     "bfloat16, at most 1.78x"),
        (replace(HALF, density=0.9), AVX2, "^dense because .* takes 1.93 bytes per weight .*: at "
            "most 1.04x"),
        (replace(HALF, encoding=Encoding("float", 16), served=FP16), AVX2,
         "^dense because .* 2.12 bytes per weight .* 2 of dense float16"),
        (HALF, Support("portable", ""), "^dense because .* slower than a dense matmul; set "
            "RAC_KERNEL=portable"),
        (HALF, Support(None, "no compiled kernel: why"), "^dense because no compiled kernel: why"),
        (replace(HALF, encoding=Encoding("float", 32), served=torch.float64), AVX2,
         "no sparse kernel reads torch.float64"),
        (replace(CODES, encoding=Encoding("int", 8, 6)), AVX2,
         "^dense because .* in groups of 6 columns, on"),
        (Layer(64, 2080, 1.0, Encoding("int", 4, 1040), BF16), AVX2,
         "^dense because .* in groups of 1040 col"),
        (replace(HALF, encoding=Encoding("float", 8, 32)), AVX2,
         "^dense because .* fp8 values in groups of"),
        (replace(CODES, density=0.5), AVX2, "^sparse int8 kernel avx2: 0.6"),
        (replace(CODES, encoding=Encoding("int", 4), density=0.5), AVX2,
         "^sparse int4 kernel avx2: 0.3"),
        (CODES, AVX2, "^int8 kernel avx2: 1.00 .* 2.00x"),
        (replace(CODES, encoding=Encoding("int", 3)), AVX2, "^int3 kernel avx2: 0.3"),
        (replace(CODES, density=0.5, activation_bits=8), Support("amx", "", True),
         r"^sparse int8 kernel amx \(activations in 8 bits\): "),
        (replace(CODES, density=0.5, activation_bits=8), AVX2,
         r"^sparse int8 kernel avx2 \(activations in 16 bits, since it multiplies no bytes\): "),
        (replace(HALF, activation_bits=8), Support("amx", "", True), "^sparse kernel amx: "),
    ],
)  # fmt: skip
def test_decisions(monkeypatch, layer, support, says):
    monkeypatch.delenv("RAC_KERNEL", raising=False)
    monkeypatch.setattr(cpu, "machine_support", lambda: support)
    decision = cpu.can_run(layer)
    assert decision.sparse != decision.reason.startswith("dense because")
    assert decision.reason.startswith(decision.kernel)
    assert re.search(says, decision.reason)


def test_the_portable_kernel_can_be_requested(native_path, monkeypatch):
    take(native_path, "portable", monkeypatch)
    assert cpu.can_run(HALF).sparse


def floats(density: float, dtype: torch.dtype) -> StoredWeight:
    """A random weight [37, 100]."""
    generator = torch.Generator().manual_seed(2)
    dense = torch.randn(37, 100, generator=generator).to(dtype)
    return from_dense(dense.masked_fill(~random_mask(37, 100, density), 0), "layer")


def integers(bits, columns, density, groups, asymmetric=False, rows=37):
    """A random weight of values of `bits`, with a scale and possibly a code of zero per group."""
    generator = torch.Generator().manual_seed(3)
    dense = torch.randint(0, 1 << bits, (rows, columns), dtype=torch.int16, generator=generator)
    zeros = torch.full((rows, groups), 1 << (bits - 1), dtype=torch.int16)
    if asymmetric:
        zeros.random_(1 << bits, generator=generator)
    dense = (dense - zeros.repeat_interleave(columns // groups, dim=1)).to(INT8)
    scale = torch.rand(rows, groups, generator=generator) + 0.1
    scale = scale.bfloat16().float() if bits < 8 else scale
    if density < 1.0:
        dense = dense.masked_fill(~random_mask(rows, columns, density), 0)
    weight = all_stored(dense, "layer") if density == 1.0 else from_dense(dense, "layer")
    codes = zeros.to(torch.uint8) if asymmetric else None
    return replace(weight, scale=scale, bits=bits, zeros=codes)


WEIGHTS = {
    "bf16": floats(0.5, BF16),
    "fp32": floats(0.5, FP32),
    "fp16": floats(0.3, FP16),
    "int8": integers(8, 100, 0.5, 1),
    "int8 in groups": integers(8, 96, 0.5, 3),
    "int4 with zeros": integers(4, 96, 0.5, 3, True),
    "dense int4 with zeros": integers(4, 96, 1.0, 3, True),
    "int4 in groups of 12": integers(4, 96, 0.5, 8, True),
    "int3": integers(3, 100, 1.0, 1),
    "int3 in groups of 24": integers(3, 96, 1.0, 4, True),
    "int2 with zeros": integers(2, 96, 1.0, 3, True),
    "int2 in groups of 12": integers(2, 96, 1.0, 8, True),
}
SERVED = [FP32, BF16, FP16]


@pytest.mark.parametrize(
    ("name", "served"), [(name, SERVED[i % 3]) for i, name in enumerate([*WEIGHTS, "bf16", "int8"])]
)
def test_matmul_and_lookup_are_those_of_the_dense_weight(best, name, served):
    weight = WEIGHTS[name]
    dense = weight.dequantized(torch.float64)
    packed = cpu.pack(weight, served)
    x = torch.randn(2, 3, weight.columns).to(served)
    bias = torch.randn(weight.rows).to(served)
    y = cpu.linear(x, packed, weight.rows, weight.columns, bias)
    assert (y.dtype, y.shape) == (served, (2, 3, weight.rows))
    expected = torch.nn.functional.linear(x.double(), dense, bias.double())
    # float32 values that are served in bfloat16 are rounded to it
    bound = (2.0**-7 if served != FP32 else 1e-4) * (x.double().abs() @ dense.abs().T + 1)
    assert bool(((y.double() - expected).abs() <= bound).all())
    ids = torch.tensor([[36, 0, 17], [17, 16, 15]])
    rows = cpu.lookup(ids, packed, weight.rows, weight.columns, served)
    assert rows.dtype == served
    assert bool(((rows.double() - dense[ids]).abs() <= 2.0**-7 * dense[ids].abs()).all())
    for bits in (8, 16):  # byte 12 of the header says whether x is rounded to bytes; floats never
        data = cpu.pack(replace(weight, activation_bits=bits), BF16)["weight_packed"]
        assert data[12] == (bits == 8 and name.startswith(("int", "dense int")))


@pytest.mark.parametrize(
    ("weight", "group_bits"),
    [
        (integers(4, 1024, 0.5, 8, rows=160), 16 / 128),
        (integers(4, 1024, 0.5, 8, True, rows=160), 24 / 128),
        (integers(4, 1024, 1.0, 32, rows=160), 16 / 32),
        (integers(3, 1024, 1.0, 16, rows=160), 16 / 64),
        (integers(2, 1024, 1.0, 8, True, rows=160), 24 / 128),
        (integers(8, 1024, 0.5, 8, rows=160), 32 / 128),
    ],
)
def test_the_bytes_that_are_announced_are_those_that_are_packed(best, weight, group_bits):
    announced = cpu.can_run(Layer.of(weight, BF16)).bytes_per_weight
    nbytes = sum(tensor.nbytes for tensor in cpu.pack(weight, BF16).values())
    assert announced * weight.rows * weight.columns == pytest.approx(nbytes, abs=512)
    bits = weight.bits * weight.density + (weight.density < 1) + group_bits
    assert announced == pytest.approx(bits / 8, rel=0.015)


def test_what_no_kernel_reads_is_refused(best):
    with pytest.raises(RacError, match=r"torch\.float64; keep it dense"):
        cpu.pack(WEIGHTS["fp32"], torch.float64)
    packed = cpu.pack(WEIGHTS["int8"], FP32)
    none = cpu.lookup(torch.empty(0, dtype=torch.int64), packed, 37, 100, FP32)
    assert none.shape == (0, 100)
    for ids, says in (([3, 37], "ids 3 to 37"), ([-1, 5], "ids -1 to 5")):
        with pytest.raises(RacError, match=f"{says}: the weight has 37 rows"):
            cpu.lookup(torch.tensor(ids), packed, 37, 100, FP32)


def test_compiled_with_float16(best):
    packed = cpu.pack(WEIGHTS["bf16"], FP16)

    def step(x, ids):
        rows = cpu.lookup(ids, packed, 37, 100, FP16)
        return cpu.linear(x, packed, 37, 100) * rows.sum()

    x, ids = torch.randn(2, 100).half(), torch.randint(0, 37, (5,))
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, ids), step(x, ids), equal_nan=True)
