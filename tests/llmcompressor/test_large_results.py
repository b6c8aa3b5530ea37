"""Before which operators freed memory is given back."""

from __future__ import annotations

import pytest
import torch

from rac_modifier.float32_products import FasterLinears
from rac_modifier.llmcompressor import large_results
from rac_modifier.llmcompressor.large_results import BeforeLargeResults, before_operator


@pytest.fixture
def asked(monkeypatch):
    """Bytes of results that were asked for."""
    sizes = []
    monkeypatch.setattr(large_results, "return_freed_memory", sizes.append)
    return sizes


@pytest.mark.parametrize(
    "compute",
    [
        lambda x, w: torch.nn.functional.linear(x, w),
        lambda x, w: torch.matmul(x, w.T),
        lambda x, w: x.matmul(w.T),
        lambda x, w: x @ w.T,
        lambda x, w: torch.nn.functional.silu(torch.cat([x] * 4, dim=-1)),
    ],
    ids=["linear", "matmul", "method", "@", "another operator"],
)
def test_the_bytes_of_the_result_are_known(compute, asked):
    x, w = torch.ones(2, 3, 5), torch.ones(20, 5)
    with torch.no_grad(), FasterLinears(), BeforeLargeResults():
        found = compute(x, w)
    assert asked[-1] == found.nbytes == 2 * 3 * 20 * 4


def test_other_devices_and_what_has_no_tensor_are_not_asked_about(asked):
    before_operator(torch.zeros, ())
    before_operator(torch.zeros, (3,))
    before_operator(torch.neg, (torch.ones(3, device="meta"),))
    assert asked == []
    before_operator(torch.matmul, (torch.ones(0, 5), torch.ones(5, 2)))
    assert asked == [0]


@pytest.mark.parametrize("order", ["layer", "auto"])
def test_both_orders_ask_within_forward_passes_and_solver(order, prune, asked):
    """Of 64 hidden numbers and 128 of the MLP, in batches of up to 512 tokens."""
    prune(preset="paper", order=order)
    assert len(asked) > 1000
    assert max(asked) > 256 * 128 * 4
