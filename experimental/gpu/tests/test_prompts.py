"""Prompts of 2:4 weights: the faster of two timings is kept, the other is freed, and results are those of the weight."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import pytest
import rac_gpu
import torch
from rac_gpu import operator, prompts
from rac_gpu.layout import ALL, BF16, Layout

from rac_modifier.errors import RacError
from rac_modifier.kernels.interface import Layer
from tests import fake_cusparselt
from tests.fake_gpu import H100
from tests.weights import (
    assert_product,
    bf16_weight,
    fp8_weight,
    int4_weight,
    int8_weight,
    kept_of_four,
    unstructured_weight,
)

DTYPE = torch.bfloat16
CPU = torch.device("cpu")
EVERY = [layout for layout in ALL if not layout.any_pattern]
KEPT, EXPANDED = ", prompts by cuSPARSELt (a copy of 1.12 bytes per weight)", ", prompts expanded"


@pytest.fixture
def asked(gpu, monkeypatch):
    """cuSPARSELt is asked for and there; `taken`: microseconds that expanding and cuSPARSELt take."""
    fake_cusparselt.install(monkeypatch)
    found = SimpleNamespace(taken=(30.0, 20.0), timed=0, compressed=[], gpu=gpu)

    def timed(runs: Sequence[Callable[[], object]]) -> list[float]:
        found.timed += 1
        assert [run().shape[0] for run in runs] == [2048, 2048]
        return list(found.taken)

    def compress(dense: torch.Tensor) -> torch.Tensor:
        copy = fake_cusparselt.compress(dense)
        found.compressed.append(weakref.ref(copy))
        return copy

    monkeypatch.setattr(prompts, "_microseconds", timed)
    monkeypatch.setattr(torch, "_cslt_compress", compress)
    yield found
    prompts.forget()


def name_of(layout: Layout) -> str:
    return f"{layout.title}-{layout.group}"


@pytest.mark.parametrize("layout", EVERY, ids=name_of)
def test_both_ways_multiply_the_same_weight_in_every_layout(asked, layout):
    """`_check_alike` compares them: each layout's sample is packed, repeated and expanded as its dense form is."""
    prepare(layout)
    choice = prompts.choose(H100, CPU, layout, 64, 272)
    assert choice.by_cusparselt
    assert asked.timed == 1


def prepare(layout: Layout) -> None:
    from rac_gpu import library

    assert library.prepare(H100, layout) is None


@pytest.mark.parametrize(
    ("taken", "by_cusparselt"), [((30.0, 20.0), True), ((20.0, 30.0), False), ((20.0, 20.0), False)]
)
def test_the_faster_one_is_taken_and_said(asked, taken, by_cusparselt):
    asked.taken = taken
    layer = Layer.of(bf16_weight(64, 256), DTYPE)
    decision = rac_gpu.can_run(layer)
    assert decision.sparse
    assert decision.kernel == f"sparse GPU kernel 2:4{KEPT if by_cusparselt else EXPANDED}"
    times = f"{taken[1]:.0f} us by cuSPARSELt and {taken[0]:.0f} us expanded"
    copy = (
        "a copy of 1.12 bytes per weight, 0.0 MB, is kept for it"
        if by_cusparselt
        else "no copy is kept"
    )
    assert decision.reason.endswith(f"; a prompt of 2048 tokens was measured here, {times}; {copy}")
    packed = rac_gpu.pack(bf16_weight(64, 256), DTYPE)
    assert set(packed) == {"weight_packed", "weight_packed_layout"} | (
        {"weight_for_prompts"} if by_cusparselt else set()
    )


@pytest.mark.parametrize("by_cusparselt", [True, False])
def test_what_was_only_timed_is_freed(asked, by_cusparselt):
    asked.taken = (2.0, 1.0) if by_cusparselt else (1.0, 2.0)
    rac_gpu.can_run(Layer.of(bf16_weight(64, 256), DTYPE))
    assert [copy() for copy in asked.compressed] == [None]
    packed = rac_gpu.pack(bf16_weight(64, 256), DTYPE)
    assert len(asked.compressed) == 1 + by_cusparselt
    if by_cusparselt:
        assert asked.compressed[1]() is packed["weight_for_prompts"]
        assert packed["weight_for_prompts"].nbytes == 64 * 256 * 2 * 9 // 16


def test_a_shape_is_timed_once_and_its_layers_run_alike(asked):
    kernels = []
    for taken in ((2.0, 1.0), (1.0, 2.0)):  # the second one is not asked any more
        asked.taken = taken
        kernels.append(rac_gpu.can_run(Layer.of(bf16_weight(64, 256), DTYPE)).kernel)
    assert asked.timed == 1
    assert kernels == [f"sparse GPU kernel 2:4{KEPT}"] * 2
    assert (
        rac_gpu.can_run(Layer.of(bf16_weight(64, 512), DTYPE)).kernel
        == f"sparse GPU kernel 2:4{EXPANDED}"
    )
    assert rac_gpu.can_run(Layer.of(int4_weight(64, 256, 128), DTYPE)).kernel.endswith(EXPANDED)
    assert asked.timed == 3


@pytest.mark.parametrize(
    "make",
    [
        bf16_weight,
        lambda rows, columns: int4_weight(rows, columns, 64),
        lambda rows, columns: int8_weight(rows, columns, kept_of_four(rows, columns).float()),
        lambda rows, columns: fp8_weight(rows, columns, kept_of_four(rows, columns).float()),
    ],
    ids=["bf16", "int4", "int8", "fp8"],
)
def test_prompts_are_the_product_with_the_rounded_weight_and_few_tokens_are_not_changed(
    asked, make
):
    """More than 256 tokens go through cuSPARSELt, without a launch; up to 256 go to the kernels."""
    weight = make(64, 256)
    packed = rac_gpu.pack(weight, DTYPE)
    asked.gpu.launches.clear()
    bias = torch.randn(64).bfloat16()
    for tokens, launches, dtype in (
        (257, 0, DTYPE),
        (300, 0, DTYPE),
        (256, 1, torch.float64),
        (1, 2, torch.float64),
    ):
        x = torch.randn(tokens, 256).bfloat16()
        y = rac_gpu.linear(x, packed, 64, 256, bias)
        assert_product(y, x, weight.dequantized(dtype).double(), bias)
        assert len(asked.gpu.launches) == launches
        again = rac_gpu.linear(x.view(1, tokens, 256), packed, 64, 256, bias)
        assert again.shape == (1, tokens, 64)
        assert torch.equal(again[0], y)
        del asked.gpu.launches[launches:]
    assert rac_gpu.linear(torch.zeros(0, 256, dtype=DTYPE), packed, 64, 256).shape == (0, 64)


def test_a_shape_that_cusparselt_does_not_take_is_expanded_with_the_reason(asked):
    decision = rac_gpu.can_run(Layer.of(bf16_weight(40, 256), DTYPE))
    assert decision.kernel == f"sparse GPU kernel 2:4{EXPANDED}"
    assert decision.reason.endswith(
        "; prompts are expanded: cuSPARSELt takes multiples of 16, not [40, 256]"
    )
    assert "weight_for_prompts" not in rac_gpu.pack(bf16_weight(40, 256), DTYPE)
    assert (asked.timed, asked.compressed) == (0, [])


def test_another_product_of_cusparselt_is_refused(asked, monkeypatch):
    def wrong(*arguments: object, **options: object) -> torch.Tensor:
        found = fake_cusparselt.sparse_mm(*arguments, **options)
        found[5, 7] += 1.0 * found.float().std()
        return found

    monkeypatch.setattr(torch, "_cslt_sparse_mm", wrong)
    with pytest.raises(
        RacError, match=r"cuSPARSELt's product of a weight \[64, 256\] is another one, by (0.9|1)"
    ):
        rac_gpu.can_run(Layer.of(bf16_weight(64, 256), DTYPE))
    monkeypatch.setattr(
        torch, "_cslt_sparse_mm", lambda *a, **b: fake_cusparselt.sparse_mm(*a, **b) * torch.nan
    )
    with pytest.raises(RacError, match=r"is another one, by nan"):
        rac_gpu.can_run(Layer.of(bf16_weight(64, 256), DTYPE))


def test_too_little_memory_to_time_it_is_said(asked, monkeypatch):
    def full(runs: Sequence[Callable[[], object]]) -> list[float]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(prompts, "_microseconds", full)
    with pytest.raises(
        RacError,
        match=r"timing a prompt of 2048 tokens times a weight \[64, 256\] does not fit .*; unset RAC_GPU",
    ):
        rac_gpu.can_run(Layer.of(bf16_weight(64, 256), DTYPE))


def test_a_copy_that_is_none_is_refused(asked):
    packed = rac_gpu.pack(bf16_weight(64, 256), DTYPE)
    x = torch.randn(300, 256).bfloat16()
    for copy in (torch.zeros(64, 100, dtype=DTYPE), torch.zeros(64, 144)):
        with pytest.raises(
            RacError, match=r"compressed: torch.* is no copy of a weight \[64, 256\] for cuSPARSELt"
        ):
            operator.sparse_linear(x, packed["weight_packed"], ALL.index(BF16), 64, 256, None, copy)


def test_a_weight_that_is_not_2_of_4_keeps_its_way(asked):
    weight = unstructured_weight(64, 1024)
    decision = rac_gpu.can_run(Layer.of(weight, DTYPE))
    assert decision.kernel == "sparse GPU kernel unstructured"
    assert "weight_for_prompts" not in rac_gpu.pack(weight, DTYPE)
    assert asked.timed == 0
