"""A cache that does not copy itself at each step, against transformers' own, which does."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, Qwen3Config
from transformers.cache_utils import DynamicLayer

from rac_modifier.sampling import roomy_cache
from rac_modifier.sampling.roomy_cache import RoomyLayer
from tests.tiny import tiny_model

ROOM = 128


def states(rows: int, tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    keys, values = torch.randn(2, rows, 3, tokens, 4, generator=torch.Generator().manual_seed(seed))
    return keys, values


@pytest.mark.parametrize("prompt", [1, 5])
def test_it_holds_what_transformers_holds_also_where_rows_are_taken_out(prompt):
    ours, theirs, kept = RoomyLayer(), DynamicLayer(), torch.tensor([0, 2, 3])
    ours.update(*states(4, prompt, 0))
    theirs.update(*states(4, prompt, 0))
    rows = 4
    for step in range(2 * ROOM + 7):  # beyond the room twice
        if step in (3, ROOM - 1, ROOM + 20):
            for layer in (ours, theirs):
                layer.batch_select_indices(kept[: rows - 1])
            rows -= 1
        further = states(rows, 1 + (step == 9), step + 1)
        found, expected = ours.update(*further), theirs.update(*further)
        for mine, their in zip(found, expected, strict=True):
            assert torch.equal(mine, their)
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)


def test_states_stay_where_they_are_until_the_room_is_used_up():
    layer = RoomyLayer()
    places = [layer.update(*states(2, 1, step))[0].data_ptr() for step in range(2 * ROOM + 2)]
    assert len(set(places[: ROOM + 1])) == 1
    assert len(set(places)) == 2
    assert layer.keys.untyped_storage().nbytes() <= (len(places) + ROOM) * 2 * 3 * 4 * 4


def test_what_was_handed_out_is_not_written_over():
    """A caller may keep the states of an earlier step."""
    layer = RoomyLayer()
    first, _ = layer.update(*states(2, 4, 0))
    layer.update(*states(2, 1, 1))
    assert torch.equal(first, states(2, 4, 0)[0])
    layer.keys = layer.keys[..., :3, :]  # somebody goes back by two tokens
    again, _ = layer.update(*states(2, 1, 2))
    assert torch.equal(
        again, torch.cat([states(2, 4, 0)[0][..., :3, :], states(2, 1, 2)[0]], dim=-2)
    )
    assert torch.equal(first, states(2, 4, 0)[0])


def test_only_plain_layers_are_replaced():
    config = Qwen3Config(
        num_hidden_layers=4, use_sliding_window=True, sliding_window=8, max_window_layers=2, hidden_size=32,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, intermediate_size=32, vocab_size=64,
    )  # fmt: skip
    theirs = [type(layer) for layer in DynamicCache(config=config).layers]
    ours = [type(layer) for layer in roomy_cache.roomy_cache(config).layers]
    assert len(set(theirs)) == 2
    assert ours == [RoomyLayer if kind is DynamicLayer else kind for kind in theirs]


def test_a_model_gives_the_same_logits():
    model = tiny_model(vocab_size=128).eval()
    ours, theirs = roomy_cache.roomy_cache(model.config), DynamicCache(config=model.config)
    ids = torch.randint(5, 128, (3, 160), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for part in (ids[:, :7], *ids[:, 7:].split(1, dim=1)):
            found, expected = (
                model(input_ids=part, past_key_values=c, use_cache=True).logits
                for c in (ours, theirs)
            )
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
