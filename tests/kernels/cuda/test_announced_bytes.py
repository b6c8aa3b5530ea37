"""Weights of any pattern are claimed, and what a decision announces per weight is what is packed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rac_modifier.kernels import cuda
from rac_modifier.kernels.interface import Layer
from tests.kernels.cuda.weights import (
    bf16_weight,
    fp8_weight,
    int4_any_weight,
    int4_weight,
    int8_weight,
    unstructured_weight,
)

BF16 = torch.bfloat16
HALF = Layer(4096, 4096, 0.5, BF16, BF16, 4096, two_of_four=True)
ANY = replace(HALF, two_of_four=False)


def test_the_bytes_that_are_announced_are_those_that_are_packed(gpu):
    weight = bf16_weight(40, 200)
    announced = cuda.can_run(Layer.of(weight, BF16)).bytes_per_weight
    assert cuda.pack(weight, BF16)["weight_packed"].numel() == announced * 40 * 200
    sizes = []
    for scales in (BF16, torch.float16, torch.float32):
        weight = int4_weight(32, 512, 128, scales)
        decision = cuda.can_run(Layer.of(weight, BF16))
        assert (
            cuda.pack(weight, BF16)["weight_packed"].numel() == decision.bytes_per_weight * 32 * 512
        )
        sizes.append(
            (decision.kernel.removeprefix("sparse GPU kernel "), decision.bytes_per_weight)
        )
    fp32 = ("2:4 int4 with fp32 scales", 0.40625)
    assert sizes == [("2:4 int4", 0.390625), fp32, fp32]


def test_weights_of_any_pattern_are_claimed_with_the_bytes_that_are_expected(gpu):
    decision = cuda.can_run(ANY)
    assert decision.sparse
    assert decision.kernel == "sparse GPU kernel unstructured"
    assert decision.reason.startswith(
        "sparse GPU kernel unstructured, not yet measured on hardware: about 1.25 bytes"
    )
    weight = unstructured_weight(256, 1024, 0.3)
    announced = cuda.can_run(Layer.of(weight, BF16)).bytes_per_weight
    assert 4 * cuda.pack(weight, BF16)["weight_packed"].numel() == pytest.approx(
        announced * 256 * 1024, rel=0.02
    )


def test_int8_is_claimed_whatever_its_pattern(gpu):
    decision = cuda.can_run(replace(ANY, stored=torch.int8))
    assert decision.kernel == "sparse GPU kernel unstructured int8"
    assert "not yet measured on hardware: about 0.68 bytes" in decision.reason
    weight = int8_weight(256, 4096, 0.4)
    announced = cuda.can_run(Layer.of(weight, BF16)).bytes_per_weight
    assert cuda.pack(weight, BF16)["weight_packed"].numel() == pytest.approx(
        announced * 256 * 4096, rel=0.02
    )
    in_groups = cuda.can_run(
        Layer.of(replace(weight, scale=torch.ones(256, 64)), BF16)
    )  # of 64 columns
    assert in_groups.kernel == "sparse GPU kernel unstructured int8"
    assert not cuda.can_run(
        Layer.of(replace(weight, scale=torch.ones(256, 128)), BF16)
    ).sparse  # of 32


def test_fp8_is_claimed_whatever_its_pattern(gpu):
    decision = cuda.can_run(replace(ANY, stored=torch.float8_e4m3fn))
    assert decision.kernel == "sparse GPU kernel unstructured fp8"
    assert "not yet measured on hardware: about 0.68 bytes" in decision.reason
    weight = fp8_weight(256, 4096, 0.4)
    announced = cuda.can_run(Layer.of(weight, BF16)).bytes_per_weight
    assert 2 * cuda.pack(weight, BF16)["weight_packed"].numel() == pytest.approx(
        announced * 256 * 4096, rel=0.02
    )


@pytest.mark.parametrize("group", [64, 128])
def test_int4_of_any_pattern_is_claimed_with_its_scales(gpu, group):
    weight = int4_any_weight(group, 256, 4096, 0.4)
    decision = cuda.can_run(Layer.of(weight, BF16))
    assert decision.kernel == "sparse GPU kernel unstructured int4"
    packed = cuda.pack(weight, BF16)["weight_packed"]
    size = packed.numel() * packed.element_size()
    assert size == pytest.approx(decision.bytes_per_weight * 256 * 4096, rel=0.02)
