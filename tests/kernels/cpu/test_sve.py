"""SVE on vectors of 128 to 2048 bits, against the references of the other kernels.

The tests that take a kernel (conftest.py) also run on an A64FX, which has vectors of 512 bits.
"""

from __future__ import annotations

import signal
import subprocess

import pytest
import torch

from rac_modifier.kernels.cpu import operator
from rac_modifier.kernels.cpu.packed import pack_scale
from rac_modifier.kernels.cpu.support import support
from tests.kernels.cpu.arm import COMPILER, EMULATOR, VECTORS, emulated, need_tool, take_arm
from tests.kernels.cpu.kernel_helpers import (
    LEVELS,
    assert_integer_product,
    assert_product,
    multiply,
    random_mask,
    run,
    scaled,
    sparse,
    threads,
    unpacked,
)
from tests.kernels.cpu.test_few_bits import weight_of as weight_of_bits
from tests.kernels.cpu.test_int4_product import weight_of
from tests.kernels.cpu.test_int8_product import integers

DTYPES = [torch.bfloat16, torch.float32]
LINES = (1, 2, 3, 4, 5, 8, 9, 18)  # rows of x: each way of the kernels
DENSITIES = (0.0, 0.03, 0.5, 0.97, 1.0)
SHAPES = [
    (1, 1),
    (16, 4),
    (17, 33),
    (33, 64),
    (37, 602),
]  # of a weight; of the last, more columns than a block


@pytest.fixture(params=VECTORS, ids=lambda bits: f"{bits} bits")
def vectors(request, arm_processor, monkeypatch):
    """Calls run on vectors of so many bits."""
    take_arm(arm_processor(VECTORS[request.param]), "sve", monkeypatch)
    return request.param


def test_it_is_preferred_where_a_vector_has_512_bits(vectors, arm_processor, monkeypatch):
    arm = arm_processor(VECTORS[vectors])
    assert arm.runs == ("portable", "neon", "dotprod", "i8mm", "sve")
    assert arm.best == ("sve" if vectors >= 512 else "i8mm")
    assert support().isa == "sve"  # requested
    monkeypatch.delenv("RAC_KERNEL")
    take_arm(arm, "", monkeypatch)
    assert support().isa == arm.best


@pytest.mark.parametrize("density", DENSITIES)
def test_floats(vectors, density):
    for i, shape in enumerate(SHAPES):
        dense, weight = sparse(random_mask(*shape, density, i), torch.bfloat16)
        for m in LINES:
            x, bias = torch.randn(m, shape[1]).to(DTYPES[(m + i) % 2]), torch.randn(shape[0])
            assert_product(multiply(x, weight, bias), x, dense, bias)


def test_expanded_floats(vectors, monkeypatch):
    """What dense products of many rows read; and the values as they were stored."""
    monkeypatch.setattr(operator, "CROSSOVER", dict.fromkeys(operator.CROSSOVER, 0))
    for columns in (1, 2, 7, 70):
        dense, weight = sparse(random_mask(37, columns, 0.5), torch.bfloat16)
        assert torch.equal(unpacked(weight), dense)
        for dtype in DTYPES:
            x = torch.randn(40, columns).to(dtype)
            assert_product(multiply(x, weight), x, dense)


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("bits", [8, 4])
def test_integer_products_are_exact(vectors, bits, density):
    """x of integers, the largest of them LEVELS, has a scale of 1: the result is the integer, rounded once to float32."""
    for rows, columns in ((1, 4), (17, 33), (37, 512)):
        dense, weight = (
            integers(rows, columns, density)
            if bits == 8
            else weight_of(rows, columns, density, 1, True)
        )
        assert torch.equal(unpacked(weight), dense)
        for m in LINES:
            x = torch.randint(-LEVELS, LEVELS + 1, (m, columns)).float()
            x[:, columns // 2] = LEVELS
            exact = (x.long() @ dense.long().T).float()
            assert torch.equal(multiply(x, weight, None, pack_scale(torch.ones(rows, 1))), exact)


@pytest.mark.parametrize("density", [0.5, 1.0])
@pytest.mark.parametrize("bits", [8, 4])
def test_scales_and_zeros_in_groups(vectors, bits, density):
    for columns, groups in ((96, 4), (640, 5), (1056, 1)):
        dense, weight = (
            integers(37, columns, density)
            if bits == 8
            else weight_of(37, columns, density, groups, True)
        )
        scale = torch.rand(37, groups) + 0.01
        for m in LINES:
            x, bias = torch.randn(m, columns).to(DTYPES[m % 2]), torch.randn(37)
            assert_integer_product(
                multiply(x, weight, bias, pack_scale(scale)), x, scaled(dense, scale), groups, bias
            )


@pytest.mark.parametrize("bits", [3, 2])
def test_fewer_bits(vectors, bits):
    dense, weight = weight_of_bits(37, 192, bits, 3)
    scale = torch.rand(37, 3) + 0.01
    for m in LINES:
        x = torch.randn(m, 192)
        assert_integer_product(
            multiply(x, weight, None, pack_scale(scale)), x, scaled(dense, scale), 3
        )


@pytest.mark.parametrize("m", [1, 6])
def test_not_a_number_and_infinity(vectors, m):
    dense, weight = sparse(random_mask(17, 40, 0.5), torch.bfloat16)
    x = torch.randn(m, 40)
    x[0, 5], x[m - 1, 7] = float("inf"), float("nan")
    y, expected = multiply(x, weight), torch.nn.functional.linear(x, dense.float())
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isinf(), expected.isinf())
    x = torch.randn(m + 1, 640)
    for _, codes in (integers(20, 640, 0.5), weight_of(20, 640, 0.5, 5, True)):
        scale = pack_scale(torch.ones(20, 5))
        clean = multiply(x, codes, None, scale)
        for value in (float("nan"), -float("inf")):
            wrong = x.clone()
            wrong[0, 571] = value
            y = multiply(wrong, codes, None, scale)
            assert not y[0].isfinite().any()
            assert torch.equal(y[1:], clean[1:])


def test_empty_and_full_rows(vectors):
    mask = random_mask(40, 130, 0.5)
    mask[3], mask[4], mask[16:32], mask[39] = False, True, False, True
    dense, weight = sparse(mask, torch.bfloat16)
    for m in (1, 5):
        x, bias = torch.randn(m, 130), torch.randn(40)
        y = multiply(x, weight, bias)
        assert_product(y, x, dense, bias)
        assert torch.equal(y[:, 16:32], bias[16:32].expand(m, -1))


def test_threads_change_nothing(vectors):
    scale = pack_scale(torch.rand(200, 5))
    weights = [
        (sparse(random_mask(200, 640, 0.5), torch.bfloat16)[1], None),
        (integers(200, 640, 0.5)[1], scale),
    ]
    for weight, scales in [*weights, (weight_of(200, 640, 0.5, 5, True)[1], scale)]:
        for m in (1, 6):
            x = torch.randn(m, 640)
            with threads(1):
                one = multiply(x, weight, None, scales)
            with threads(3):
                assert torch.equal(multiply(x, weight, None, scales), one)


def test_an_instruction_that_is_missing_stops_a_program(tmp_path):
    """The emulator would show it if the library used SVE on the processors of the other tests."""
    for tool in (COMPILER, EMULATOR):
        need_tool(tool)
    source = tmp_path / "sve.cpp"
    source.write_text(
        'int main() { asm volatile(".arch armv8.2-a+sve\\n ptrue p0.b" ::: "p0"); }\n'
    )
    run(COMPILER, "-O1", "-march=armv8.2-a+sve", str(source), "-o", str(tmp_path / "sve"))
    for processor, code in (
        ("a64fx", 0),
        ("max,sve=off", -signal.SIGILL),
        ("neoverse-n1", -signal.SIGILL),
    ):
        assert subprocess.run(emulated(processor, tmp_path / "sve")).returncode == code
