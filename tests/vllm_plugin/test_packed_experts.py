"""The operator of packed experts: alone, in a batch, compiled, and of two models."""

import pytest
import torch

from rac_modifier.kernels.cpu.support import support
from tests.vllm_plugin.vllm_fixtures import needs_vllm

needs_vllm()

from tests.vllm_plugin.test_experts import (
    CHOSEN,
    HIDDEN,
    FakeLayer,
    check,
    finished,
    routed,
    weights_of,
)

pytestmark = pytest.mark.skipif(support().isa is None, reason=support().reason)


def test_a_token_gets_the_same_alone_in_a_batch_and_compiled():
    layer, (x, shares, ids) = FakeLayer(), routed(6)
    finished(layer, weights_of())
    packed = layer.sparse_experts
    batch = packed(x, shares, ids)
    alone = [packed(x[at, None], shares[at, None], ids[at, None]) for at in range(6)]
    torch.testing.assert_close(batch, torch.cat(alone), rtol=1e-5, atol=1e-5)
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, shares, ids), batch)
    nobody = torch.zeros(0, CHOSEN)
    assert packed(torch.zeros(0, HIDDEN), nobody, nobody.int()).shape == (0, HIDDEN)


def test_two_models_in_one_process_keep_their_experts():
    weights, routing = weights_of(), routed(5)
    doubled = {name: 2 * weight for name, weight in weights.items()}
    layers = [FakeLayer(), FakeLayer()]
    for layer, own in zip(layers, (weights, doubled), strict=True):
        finished(layer, own)
    assert layers[0].sparse_experts.name != layers[1].sparse_experts.name
    check(layers[0].sparse_experts(*routing), weights, routing)
    check(layers[1].sparse_experts(*routing), doubled, routing, 1e-3)
