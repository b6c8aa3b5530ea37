"""Who asks for cuSPARSELt, where that is refused, and its product on operators that are not cuSPARSELt's."""

from __future__ import annotations

import pytest
import torch
from rac_gpu import cusparselt

from rac_modifier.errors import RacError
from tests import fake_cusparselt
from tests.weights import assert_product, bf16_weight

CPU = torch.device("cpu")


@pytest.mark.parametrize("value", [None, "", "expand"])
def test_it_is_off_unless_the_environment_asks_for_it(monkeypatch, value):
    monkeypatch.delenv("RAC_GPU_PROMPTS", raising=False)
    if value is not None:
        monkeypatch.setenv("RAC_GPU_PROMPTS", value)
    assert not cusparselt.requested()


def test_what_would_have_no_effect_is_refused(monkeypatch):
    fake_cusparselt.install(monkeypatch)
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "0")
    assert cusparselt.requested()
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    with pytest.raises(RacError, match="with VLLM_BATCH_INVARIANT one kernel multiplies every"):
        cusparselt.requested()
    monkeypatch.delenv("VLLM_BATCH_INVARIANT")
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    with pytest.raises(RacError, match=r"torch .* has no cuSPARSELt; install torch for CUDA"):
        cusparselt.requested()
    monkeypatch.setenv("RAC_GPU_PROMPTS", "cutlass")
    with pytest.raises(RacError, match='RAC_GPU_PROMPTS="cutlass": use expand or cusparselt'):
        cusparselt.requested()


@pytest.mark.parametrize(
    ("rows", "columns", "fits"), [(48, 112, True), (40, 112, False), (48, 120, False)]
)
def test_rows_and_columns_are_multiples_of_16(rows, columns, fits):
    words = cusparselt.problem(rows, columns)
    assert words == (None if fits else f"cuSPARSELt takes multiples of 16, not [{rows}, {columns}]")


@pytest.mark.parametrize("tokens", [257, 264, 1])
def test_the_product_is_that_of_the_weight_whatever_the_number_of_tokens(monkeypatch, tokens):
    """The operator wants a multiple of 8."""
    fake_cusparselt.install(monkeypatch)
    weight = bf16_weight(48, 112)
    compressed = cusparselt.compress(weight.dense(), CPU)
    assert compressed.numel() == 48 * 112 * 9 // 16
    x, bias = torch.randn(tokens, 112).bfloat16(), torch.randn(48).bfloat16()
    dense = weight.dequantized(torch.float64)
    assert_product(cusparselt.product(x, compressed, bias), x, dense, bias)
    assert_product(cusparselt.product(x, compressed, None), x, dense)


def test_what_cusparselt_answers_is_said(monkeypatch):
    fake_cusparselt.install(monkeypatch)

    def refuse(*arguments: object, **options: object) -> None:
        raise RuntimeError("architecture mismatch when calling `cusparseLtInit`\nstack")

    monkeypatch.setattr(torch, "_cslt_compress", refuse)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", refuse)
    words = (
        r"^cuSPARSELt: architecture mismatch when calling `cusparseLtInit`; unset RAC_GPU_PROMPTS$"
    )
    with pytest.raises(RacError, match=words):
        cusparselt.compress(torch.zeros(16, 16), CPU)
    with pytest.raises(RacError, match=words):
        cusparselt.product(torch.zeros(8, 16), torch.zeros(16, 9), None)

    def full(dense: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "_cslt_compress", full)
    with pytest.raises(
        RacError,
        match=r"copy of a weight \[16, 32\] for cuSPARSELt does not fit into the GPU's memory",
    ):
        cusparselt.compress(torch.zeros(16, 32), CPU)
