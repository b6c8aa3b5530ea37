"""What rounded and stored heads and embeddings share: a tied pair in floats, a packed weight, and rows that are looked up."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.vllm_plugin.vllm_fixtures import needs_vllm

needs_vllm()

from rac_modifier.checkpoint.stored_weight import all_stored  # noqa: E402
from rac_modifier.kernels.choose import choose  # noqa: E402
from rac_modifier.kernels.cpu.support import support  # noqa: E402
from rac_modifier.kernels.interface import Layer  # noqa: E402
from rac_modifier.vllm_plugin.vocabulary import VocabularyMethod  # noqa: E402

ROWS, COLUMNS = 70, 64


def layer_of(weight: torch.Tensor | None) -> torch.nn.Module:
    layer = torch.nn.Module()
    layer.params_dtype = torch.float32
    layer.quant_method = VocabularyMethod()
    if weight is not None:
        layer.register_parameter("weight", torch.nn.Parameter(weight, requires_grad=False))
    return layer


def test_a_tied_pair_in_floats_is_one_weight():
    weight = torch.randn(ROWS, COLUMNS)
    embedding, head = layer_of(weight.clone()), layer_of(torch.zeros(ROWS, COLUMNS))
    assert head.quant_method.tie_weights(head, embedding) is head
    for layer in (embedding, head):
        layer.quant_method.process_weights_after_loading(layer)
    assert head.weight is embedding.weight
    assert not head.quant_method.shares(head)
    x, ids = torch.randn(2, COLUMNS), torch.tensor([[3, 69], [0, 3]])
    torch.testing.assert_close(head.quant_method.apply(head, x), x @ weight.T)
    torch.testing.assert_close(embedding.quant_method.embedding(embedding, ids), weight[ids])


def test_a_tied_pair_that_is_packed_is_one_packed_weight():
    if support().isa in (None, "portable"):
        pytest.skip(support().reason)
    values, scale = (
        torch.randint(-127, 128, (ROWS, COLUMNS), dtype=torch.int8),
        torch.rand(ROWS, 1) + 0.5,
    )
    meant = values.float() * scale
    embedding, head = layer_of(torch.zeros(ROWS, COLUMNS)), layer_of(torch.zeros(ROWS, COLUMNS))
    head.quant_method.tie_weights(head, embedding)
    _, backend = choose(Layer(ROWS, COLUMNS, 1.0, torch.int8, torch.float32, COLUMNS, 4), "cpu")
    assert backend is not None
    stored = replace(all_stored(values, "embedding"), scale=scale, bits=8)
    embedding.quant_method.keep_packed(embedding, backend, stored, torch.float32)
    head.quant_method.process_weights_after_loading(head)
    assert not hasattr(embedding, "weight")
    assert not hasattr(head, "weight")
    assert head.weight_packed is embedding.weight_packed
    x, ids = torch.randn(2, COLUMNS), torch.tensor([[3, 69], [0, 3]])
    torch.testing.assert_close(head.quant_method.apply(head, x), x @ meant.T, rtol=1e-3, atol=2e-1)
    torch.testing.assert_close(embedding.quant_method.embedding(embedding, ids), meant[ids])
