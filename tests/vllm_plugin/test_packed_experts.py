"""Experts that are packed directly, as vLLM's layer keeps them."""

from __future__ import annotations

import pytest
import torch

from rac_modifier.checkpoint.stored_weight import from_dense
from rac_modifier.kernels import cpu
from rac_modifier.kernels.cpu.support import support
from rac_modifier.vllm_plugin.packed_experts import PackedExperts
from tests.checkpoint.test_stored_weight import random_weight

EXPERTS, HIDDEN, WIDTH, CHOSEN = 4, 32, 48, 3


@pytest.fixture(autouse=True)
def _kernels() -> None:
    if support().isa is None:
        pytest.skip(support().reason)


def dense(seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [
        (
            random_weight(2 * WIDTH, HIDDEN, seed + number, False),
            random_weight(HIDDEN, WIDTH, seed + 50 + number, False),
        )
        for number in range(EXPERTS)
    ]


def packed(
    weights: list[tuple[torch.Tensor, torch.Tensor]], name: str = "experts"
) -> PackedExperts:
    pairs = [((cpu, from_dense(up, "up")), (cpu, from_dense(down, "down"))) for up, down in weights]
    return PackedExperts(name, pairs, torch.nn.functional.silu, torch.float32)


def routed(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ids = torch.stack([torch.randperm(EXPERTS)[:CHOSEN] for _ in range(tokens)])
    return torch.randn(tokens, HIDDEN), torch.rand(tokens, CHOSEN), ids


def expected(
    weights: list[tuple[torch.Tensor, torch.Tensor]], *given: torch.Tensor
) -> torch.Tensor:
    x, shares, ids = given
    out = torch.zeros(x.shape, dtype=torch.float64)
    for token, place in ((token, place) for token in range(len(x)) for place in range(CHOSEN)):
        up, down = (weight.double() for weight in weights[int(ids[token, place])])
        both = up @ x[token].double()
        out[token] += float(shares[token, place]) * (
            down @ (both[:WIDTH] / (1 + torch.exp(-both[:WIDTH])) * both[WIDTH:])
        )
    return out


@pytest.mark.parametrize("tokens", [0, 1, 9])
def test_against_one_token_and_one_expert_at_a_time(tokens):
    weights = dense(0)
    given = (
        routed(tokens)
        if tokens
        else (torch.zeros(0, HIDDEN), torch.zeros(0, CHOSEN), torch.zeros(0, CHOSEN).long())
    )
    found = packed(weights)(*given)
    assert found.shape == (tokens, HIDDEN)
    torch.testing.assert_close(found.double(), expected(weights, *given), rtol=1e-4, atol=1e-4)


def test_a_token_gets_the_same_alone_and_in_a_batch():
    experts, (x, shares, ids) = packed(dense(0)), routed(6)
    alone = torch.cat(
        [experts(x[token, None], shares[token, None], ids[token, None]) for token in range(6)]
    )
    torch.testing.assert_close(experts(x, shares, ids), alone, rtol=1e-5, atol=1e-5)


def test_compiled():
    experts, given = packed(dense(0)), routed(3)
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*given), experts(*given))


def test_two_models_in_one_process_keep_their_experts():
    first, second = packed(dense(0)), packed(dense(7))
    assert first.name == "experts"
    assert second.name == "experts#2"
    given = routed(5)
    for experts, seed in ((first, 0), (second, 7)):
        torch.testing.assert_close(
            experts(*given).double(), expected(dense(seed), *given), rtol=1e-4, atol=1e-4
        )
    del first, experts
    assert packed(dense(0)).name == "experts"  # free again
