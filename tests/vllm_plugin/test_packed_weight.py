"""A weight in a backend's layout, as parameters of its layer. Runs without vLLM."""

from __future__ import annotations

import torch

from rac_modifier.checkpoint.stored_weight import from_dense
from rac_modifier.vllm_plugin.packed_weight import PackedWeight
from tests.checkpoint.test_stored_weight import random_weight
from tests.kernels import fake_backend

DENSE = random_weight(24, 40, 0, True, torch.float32)


def test_what_the_backend_packs_becomes_parameters():
    layer = torch.nn.Module()
    weight = PackedWeight(layer, fake_backend, from_dense(DENSE, "a"), torch.float32)
    assert (weight.rows, weight.columns) == (24, 40)
    assert dict(layer.named_parameters()).keys() == {"fake_columns", "fake_flag"}
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    x, bias = torch.randn(3, 40), torch.randn(24)
    torch.testing.assert_close(
        weight.linear(layer, x, bias), torch.nn.functional.linear(x, DENSE, bias)
    )


def test_a_parameter_that_was_replaced_is_read():
    layer = torch.nn.Module()
    weight = PackedWeight(layer, fake_backend, from_dense(DENSE, "a"), torch.float32)
    layer.fake_columns = torch.nn.Parameter(2 * layer.fake_columns.data, requires_grad=False)
    x = torch.randn(3, 40)
    torch.testing.assert_close(weight.linear(layer, x, None), 2 * x @ DENSE.T)
