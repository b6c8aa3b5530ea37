"""Grouped attention against plain attention written out, and against transformers' own in whole models."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rac_modifier.sampling import attention
from rac_modifier.sampling.attention import grouped_attention, grouped_sdpa
from rac_modifier.sampling.decode import decode
from rac_modifier.sampling.draw import Draw
from rac_modifier.sampling.row_noise import row_keys
from tests.tiny import tiny_model


def written_out(query, key, value, mask, scaling):
    """Head by head, in float64."""
    rows, heads, _, _ = query.shape
    group = heads // key.shape[1]
    output = torch.zeros(rows, 1, heads, value.shape[-1], dtype=torch.float64)
    for row in range(rows):
        for head in range(heads):
            scores = key[row, head // group].double() @ query[row, head, 0].double() * scaling
            scores[~mask[row, 0, 0]] = -math.inf
            output[row, 0, head] = scores.softmax(0) @ value[row, head // group].double()
    return output


@pytest.mark.parametrize(("heads", "shared"), [(9, 3), (4, 1), (6, 6)])
def test_it_is_attention_in_which_neighbouring_heads_share_keys(heads, shared):
    rows, length, size = 3, 11, 8
    query = torch.randn(rows, heads, 1, size)
    key, value = torch.randn(2, rows, shared, length, size)
    mask = torch.rand(rows, 1, 1, length) < 0.7
    mask[..., -1] = True
    module = torch.nn.Module()
    module.num_key_value_groups = heads // shared
    found, _ = grouped_sdpa(module, query, key, value, mask, scaling=0.3)
    torch.testing.assert_close(
        found.double(), written_out(query, key, value, mask, 0.3), rtol=1e-5, atol=1e-6
    )


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("make", [llama, lambda: tiny_model(vocab_size=128)])
def test_models_decode_the_same_tokens_and_keep_their_attention(make, monkeypatch):
    model, used = make(), []

    def counted(*args, **options):
        used.append(args[1].shape[2])
        return grouped_sdpa(*args, **options)

    monkeypatch.setattr(attention, "grouped_sdpa", counted)
    prompts = [[2, 40, 50], [2, 60], [2, *range(10, 30)]]
    options = {
        "limits": [20] * 3,
        "eos": [],
        "pad": 0,
        "draw": Draw(1.0),
        "rows": row_keys(0, ["a", "b", "c"]),
    }
    plain = decode(model, prompts, **options)
    assert not used
    with grouped_attention(model):
        assert decode(model, prompts, **options) == plain
    assert used.count(1) == 19 * 2
    assert model.config._attn_implementation == "sdpa"
    used.clear()
    assert decode(model, prompts, **options) == plain
    assert not used


def test_it_is_put_back_after_an_error_and_leaves_other_attention_alone():
    model = tiny_model()
    with pytest.raises(ZeroDivisionError), grouped_attention(model):
        raise ZeroDivisionError
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    with grouped_attention(model):
        assert model.config._attn_implementation == "eager"
