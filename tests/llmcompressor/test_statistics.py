"""Which modules read the same input in a layer's pass."""

import pytest
import torch

from rac_modifier import RacError
from rac_modifier.distributed.processes import ALONE
from rac_modifier.llmcompressor.statistics import Collector

ONES = torch.ones(1, 5)


def rows(seed: int, tokens: int = 5) -> torch.Tensor:
    return torch.randn(1, tokens, 4, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def modules():
    return {name: torch.nn.Linear(4, 4) for name in ("q", "k", "o")}


@pytest.fixture
def collector(modules):
    return Collector({m: name for name, m in modules.items()}, ALONE)


def test_modules_that_get_the_same_tensor_are_one_group_with_one_hessian(collector, modules):
    for batch in range(2):
        x, other = rows(batch), rows(10 + batch)
        collector.observe(modules["q"], x, ONES, first=batch == 0)
        collector.observe(modules["k"], x, ONES, first=batch == 0)
        collector.observe(modules["o"], other, ONES, first=batch == 0)
    pair, alone = collector.groups
    assert (pair.modules, alone.modules) == ([modules["q"], modules["k"]], [modules["o"]])
    assert pair.statistics.hessian.tokens == alone.statistics.hessian.tokens == 10
    x = torch.cat([rows(0), rows(1)]).flatten(0, 1).double()
    hessian = pair.statistics.hessian.take().double()
    torch.testing.assert_close(hessian, 2 / 10 * x.T @ x, rtol=1e-5, atol=1e-5)
    assert pair.statistics.take_cross_moment() is None


def test_a_module_that_first_runs_in_a_later_batch_joins_no_older_group(collector, modules):
    collector.observe(modules["q"], rows(0), ONES, first=True)
    x = rows(1)
    collector.observe(modules["q"], x, ONES, first=False)
    collector.observe(modules["k"], x, ONES, first=False)
    first, second = collector.groups
    assert (first.statistics.hessian.tokens, second.statistics.hessian.tokens) == (10, 5)


def test_a_group_that_no_longer_reads_one_tensor_is_an_error(collector, modules):
    x = rows(0)
    collector.observe(modules["q"], x, ONES, first=True)
    collector.observe(modules["k"], x, ONES, first=True)
    collector.observe(modules["q"], rows(1), ONES, first=False)
    with pytest.raises(RacError, match="k no longer reads the same input as q"):
        collector.observe(modules["k"], rows(1), ONES, first=False)


def test_a_module_that_gets_only_some_tokens_is_an_error(collector, modules):
    with pytest.raises(RacError, match=r"q got 3 of the 5 tokens .*moe_calibrate_all_experts=True"):
        collector.observe(modules["q"], rows(0, tokens=3), ONES, first=True)
