"""Decoding against one forward pass per token of each row alone; attention and cache against
transformers."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3NextConfig
from transformers.cache_utils import DynamicLayer

from rac_modifier.sampling import decode as decoding
from rac_modifier.sampling.decode import _grouped_sdpa, _RoomyLayer, decode, grouped_attention
from rac_modifier.sampling.draw import Draw, _gumbel_noise, row_keys

EOS = [1, *range(118, 128)]
PROMPTS = [[2, 40, 50], [2, 60], [2, *range(10, 17)], [2, 33, 34, 35, 36], [2, 9], [2, 71, 72]]
LIMITS = [24, 3, 20, 24, 1, 24]


def alone(model, prompt, limit, key, temperature):
    ids = list(prompt)
    for step in range(limit):
        scores = model(torch.tensor([ids])).logits[:, -1]
        if temperature:
            scores = scores / temperature
            scores = scores + _gumbel_noise(key[None], step, torch.arange(128))
        ids.append(int(scores.argmax()))
        if ids[-1] in EOS:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("temperature", [0.0, 1.0, 3.0])
def test_each_row_is_what_it_is_alone(model, temperature):
    keys = row_keys(5, [f"k{i}" for i in range(len(PROMPTS))])
    rows = decode(model, PROMPTS, limits=LIMITS, eos=EOS, pad=0, draw=Draw(temperature), rows=keys)
    expected = [
        alone(model, *each, temperature) for each in zip(PROMPTS, LIMITS, keys, strict=True)
    ]
    assert [row[: len(e)] for row, e in zip(rows, expected, strict=True)] == expected
    assert [len(row) for row in rows] == LIMITS
    if temperature:
        assert len({len(e) for e in expected}) > 3  # rows do end at different times


def test_ended_rows_of_a_model_with_linear_attention_are_taken_out_too():
    """Qwen3-Next, Qwen3.5 and Granite 4 have layers whose cache is a state."""
    torch.manual_seed(0)
    sizes = dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2)
    sizes |= dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "head_dim"), 16)
    sizes |= {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 64}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    kinds = {"layer_types": ["linear_attention", "full_attention"], "mlp_only_layers": [0, 1]}
    config = Qwen3NextConfig(**sizes, **kinds, initializer_range=0.1)
    hybrid = AutoModelForCausalLM.from_config(config).eval()
    keys = row_keys(5, [f"k{i}" for i in range(len(PROMPTS))])
    rows = decode(hybrid, PROMPTS, limits=LIMITS, eos=EOS, pad=0, draw=Draw(1.0), rows=keys)
    with torch.no_grad():
        expected = [alone(hybrid, *each, 1.0) for each in zip(PROMPTS, LIMITS, keys, strict=True)]
    assert [row[: len(e)] for row, e in zip(rows, expected, strict=True)] == expected


def test_ended_rows_are_not_computed(model, monkeypatch):
    """Once a quarter of the rows have ended; the last step has the one row that is left."""
    sizes = []
    forward = model.forward

    def counting(input_ids, **options):
        sizes.append(len(input_ids))
        return forward(input_ids=input_ids, **options)

    monkeypatch.setattr(model, "forward", counting)
    limits = [2, 3, 4, 5, 6, 7, 8, 20]
    prompts = [[2, 40 + i] for i in range(8)]
    rows = torch.zeros(8, dtype=torch.int64)
    decode(model, prompts, limits=limits, eos=[], pad=0, draw=Draw(0.0), rows=rows)
    assert len(sizes) == 20
    assert sizes[:2] == [8, 8]
    assert sizes[-1] == 1
    assert all(
        size <= sum(limit > step for limit in limits) / 0.75 for step, size in enumerate(sizes)
    )


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
    output, _ = _grouped_sdpa(module, query, key, value, mask, scaling=0.3)
    expected = written_out(query, key, value, mask, 0.3)
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-6)


def test_models_decode_the_same_tokens_and_keep_their_attention(model, monkeypatch):
    used = []

    def counted(*args, **options):
        used.append(args[1].shape[2])
        return _grouped_sdpa(*args, **options)

    monkeypatch.setattr(decoding, "_grouped_sdpa", counted)
    prompts = [[2, 40, 50], [2, 60], [2, *range(10, 30)]]
    rows = row_keys(0, ["a", "b", "c"])
    options = {"limits": [20] * 3, "eos": [], "pad": 0, "draw": Draw(1.0), "rows": rows}
    plain = decode(model, prompts, **options)
    assert not used
    with grouped_attention(model):
        assert decode(model, prompts, **options) == plain
    assert used.count(1) == 19 * model.config.num_hidden_layers
    assert model.config._attn_implementation == "sdpa"


ROOM = 128


def states(rows: int, tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    keys, values = torch.randn(2, rows, 3, tokens, 4, generator=torch.Generator().manual_seed(seed))
    return keys, values


def test_the_cache_holds_what_transformers_holds_also_where_rows_are_taken_out():
    ours, theirs = _RoomyLayer(), DynamicLayer()
    ours.update(*states(4, 5, 0))
    theirs.update(*states(4, 5, 0))
    first, rows, places = ours.keys, 4, set()
    for step in range(2 * ROOM + 7):  # beyond the room twice
        if step in (3, ROOM - 1, ROOM + 20):
            rows -= 1
            for layer in (ours, theirs):
                layer.batch_select_indices(torch.tensor([0, 2, 3])[:rows])
        further = states(rows, 1 + (step == 9), step + 1)
        for our, their in zip(ours.update(*further), theirs.update(*further), strict=True):
            assert torch.equal(our, their)
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)
        places.add(ours.keys.data_ptr())
    assert len(places) <= 6, "no copy at each step"
    assert torch.equal(first, states(4, 5, 0)[0]), "what was handed out is not written over"
