"""Which modules share a Hessian, and when a forward pass is stopped."""

import pytest
import torch

from rac_modifier.errors import RacError
from rac_modifier.llmcompressor.input_groups import HessianCollector
from rac_modifier.model_tools import StopForward
from rac_modifier.pruning.hessian import Hessian


class CalledTwice(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

    def forward(self, x):
        return self.a(self.b(self.a(x)))


def test_a_module_called_twice_is_counted_twice_and_never_stopped_before():
    """`a` and `b` have both been seen when `a` is about to be called again."""
    generator = torch.Generator().manual_seed(0)
    net = CalledTwice()
    collector = HessianCollector({net.a: "a", net.b: "b"})
    collector.expect([net.a, net.b])
    inputs = {net.a: [], net.b: []}
    batch = 0

    def hook(module, args):
        inputs[module].append(args[0])
        collector.observe(module, args[0], torch.ones(args[0].shape[:-1]), batch)

    for module in (net.a, net.b):
        module.register_forward_pre_hook(hook)
    with torch.no_grad():
        for batch in range(3):  # noqa: B007 - the hook reads it
            net(torch.randn(2, 5, 4, generator=generator))  # StopForward would come out here
    assert (len(inputs[net.a]), len(inputs[net.b])) == (6, 3)
    for group in collector.take([net.a, net.b]):
        expected = Hessian(4)
        for x in inputs[group.modules[0]]:
            expected.add(x)
        torch.testing.assert_close(group.hessian.matrix(), expected.matrix())


def test_modules_that_read_one_tensor_share_a_hessian_and_the_forward_ends_with_the_last():
    a, b, c = (torch.nn.Linear(4, 4) for _ in range(3))
    collector = HessianCollector({a: "a", b: "b", c: "c"})
    collector.expect([a, b, c])
    x, y = torch.ones(1, 3, 4), torch.ones(1, 3, 4)
    weights = torch.ones(1, 3)
    for module, value in ((a, x), (b, x), (c, y)):
        collector.observe(module, value, weights, 0)  # the first batch is run to its end
    for module, value in ((a, x), (b, x)):
        collector.observe(module, value, weights, 1)
    with pytest.raises(StopForward):
        collector.observe(c, y, weights, 1)
    groups = collector.take([a, b, c])
    assert [group.modules for group in groups] == [[a, b], [c]]
    assert [group.hessian.tokens for group in groups] == [6, 6]
    assert collector.take([a, b, c]) == []


def test_a_module_that_sees_some_of_the_tokens_is_refused():
    a = torch.nn.Linear(4, 4)
    collector = HessianCollector({a: "experts.0.up"})
    with pytest.raises(RacError, match=r"experts\.0\.up saw 2 of the batch's 3 tokens.*moe_calibrate_all_experts"):
        collector.observe(a, torch.ones(2, 4), torch.ones(1, 3), 0)


def test_modules_that_stop_sharing_an_input_are_an_error():
    a, b = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    collector = HessianCollector({a: "a", b: "b"})
    x, weights = torch.ones(1, 3, 4), torch.ones(1, 3)
    for module in (a, b):
        collector.observe(module, x, weights, 0)
    collector.observe(a, x, weights, 1)
    with pytest.raises(RuntimeError, match="b no longer reads the same input as a"):
        collector.observe(b, x.clone(), weights, 1)
