"""Which modules read the same input, and when a forward pass may end."""

import pytest
import torch

from rac_modifier import RacError
from rac_modifier.llmcompressor.input_groups import HessianCollector
from rac_modifier.model_tools import StopForward


def module() -> torch.nn.Module:
    return torch.nn.Linear(4, 4)


def rows(seed: int, tokens: int = 5) -> torch.Tensor:
    return torch.randn(1, tokens, 4, generator=torch.Generator().manual_seed(seed))


ONES = torch.ones(1, 5)


@pytest.fixture
def modules():
    return {name: module() for name in ("q", "k", "o")}


@pytest.fixture
def collector(modules):
    return HessianCollector({m: name for name, m in modules.items()})


def test_modules_that_get_the_same_tensor_are_one_group_with_one_hessian(collector, modules):
    for batch in range(2):
        x, other = rows(batch), rows(10 + batch)
        collector.observe(modules["q"], x, ONES, batch)
        collector.observe(modules["k"], x, ONES, batch)
        collector.observe(modules["o"], other, ONES, batch)
    pair, alone = collector.take(modules.values())
    assert (pair.modules, alone.modules) == ([modules["q"], modules["k"]], [modules["o"]])
    assert pair.statistics.hessian.tokens == alone.statistics.hessian.tokens == 10
    x = torch.cat([rows(0), rows(1)]).flatten(0, 1).double()
    torch.testing.assert_close(
        pair.statistics.hessian.matrix().double(), 2 / 10 * x.T @ x, rtol=1e-5, atol=1e-5
    )
    assert pair.statistics.cross_moment() is None


def test_equal_values_in_another_tensor_are_another_group(collector, modules):
    x = rows(0)
    collector.observe(modules["q"], x, ONES, 0)
    collector.observe(modules["k"], x.clone(), ONES, 0)
    assert [len(group.modules) for group in collector.take(modules.values())] == [1, 1]


def test_a_module_that_first_runs_in_a_later_batch_joins_no_older_group(collector, modules):
    collector.observe(modules["q"], rows(0), ONES, 0)
    x = rows(1)
    collector.observe(modules["q"], x, ONES, 1)
    collector.observe(modules["k"], x, ONES, 1)
    first, second = collector.take(modules.values())
    assert (first.statistics.hessian.tokens, second.statistics.hessian.tokens) == (10, 5)


def test_a_group_that_no_longer_reads_one_tensor_is_an_error(collector, modules):
    x = rows(0)
    collector.observe(modules["q"], x, ONES, 0)
    collector.observe(modules["k"], x, ONES, 0)
    collector.observe(modules["q"], rows(1), ONES, 1)
    with pytest.raises(RuntimeError, match="k no longer reads the same input as q"):
        collector.observe(modules["k"], rows(1), ONES, 1)


def test_the_second_module_before_the_first_in_a_batch_is_an_error(collector, modules):
    x = rows(0)
    collector.observe(modules["q"], x, ONES, 0)
    collector.observe(modules["k"], x, ONES, 0)
    with pytest.raises(RuntimeError, match="k no longer reads the same input as q"):
        collector.observe(modules["k"], x, ONES, 1)


def test_a_module_that_gets_only_some_tokens_is_an_error(collector, modules):
    with pytest.raises(
        RacError, match=r"q got 3 of the 5 tokens of the batch.*moe_calibrate_all_experts=True"
    ):
        collector.observe(modules["q"], rows(0, tokens=3), ONES, 0)


def test_groups_are_taken_once_and_only_those_asked_for(collector, modules):
    for name in ("q", "o"):
        collector.observe(modules[name], rows(0), ONES, 0)
    (group,) = collector.take([modules["o"], module()])
    assert group.modules == [modules["o"]]
    assert collector.take([modules["o"]]) == []
    assert len(collector.take([modules["q"]])) == 1


def test_a_pass_ends_at_its_last_module_from_the_second_batch_on(collector, modules):
    collector.expect([modules["q"], modules["o"]])
    collector.observe(modules["q"], rows(0), ONES, 0)
    collector.observe(modules["o"], rows(1), ONES, 0)
    collector.observe(modules["q"], rows(2), ONES, 1)
    with pytest.raises(StopForward):
        collector.observe(modules["o"], rows(3), ONES, 1)
    assert [group.statistics.hessian.tokens for group in collector.take(modules.values())] == [
        10,
        10,
    ]


def test_a_pass_is_never_ended_when_a_module_is_called_twice(collector, modules):
    collector.expect([modules["q"], modules["o"]])
    for batch in range(2):
        for name in ("q", "o", "q"):
            collector.observe(modules[name], rows(batch), ONES, batch)
    group = collector.take([modules["q"]])[0]
    assert group.statistics.hessian.tokens == 20


def test_without_expected_modules_no_pass_is_ended(collector, modules):
    collector.expect([])
    for batch in range(2):
        collector.observe(modules["q"], rows(batch), ONES, batch)
