"""Decode a batch whose rows end at different times: ended rows are taken out of the batch.

Two copies of the key-value cache are avoided: `_grouped_sdpa` does not repeat it per query head,
and `_RoomyLayer` does not copy it at every step.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rac_modifier.sampling.draw import Draw

# Rows are taken out when a quarter of them have ended: that copies the key-value cache.
_COMPACT_BELOW = 0.75
_ATTENTION = "rac_grouped_sdpa"
_ROOM = 128  # tokens by which the cache grows


@torch.no_grad()
def decode(
    model: PreTrainedModel,
    prompts: list[list[int]],
    *,
    limits: list[int],
    eos: list[int],
    pad: int,
    draw: Draw,
    rows: torch.Tensor,
) -> list[list[int]]:
    """Complete left-padded prompts of a causal LM in evaluation mode.

    `limits` are the most new tokens of each row, `eos` the ids that end one, `rows` the keys of
    `draw.row_keys`. Returns the new tokens of each row, not yet cut at its EOS.
    """
    device, width = model.device, max(map(len, prompts))
    inputs = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    cache = _roomy_cache(model.config)
    keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
    only_last = {"logits_to_keep": 1} if keeps else {}
    ends, longest = torch.tensor(eos, device=device), torch.tensor(limits, device=device)
    output = torch.full((len(prompts), max(limits)), pad, device=device)
    present = torch.arange(len(prompts), device=device)  # the prompt of each row of the batch
    running = torch.ones_like(present, dtype=torch.bool)

    for step in range(max(limits)):
        logits = model(
            input_ids=inputs,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            **only_last,
        ).logits[:, -1]
        tokens = draw.tokens(logits, rows, step)
        output[present, step] = tokens
        running &= ~torch.isin(tokens, ends) & (longest[present] > step + 1)
        count = int(running.sum())
        if count == 0:
            break
        inputs, positions = tokens[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, torch.ones_like(inputs)], dim=1)
        if count <= _COMPACT_BELOW * len(running):
            active = running.nonzero().squeeze(1)
            # batch_select_indices lacks linear attention
            cache.reorder_cache(active)  # type: ignore[arg-type]
            inputs, positions, mask = inputs[active], positions[active], mask[active]
            present, rows, running = present[active], rows[active], running[active]
    return [row[:limit] for row, limit in zip(output.tolist(), limits, strict=True)]


def _grouped_sdpa(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Compute what `sdpa_attention_forward` computes; several queries per head are left to it.

    `query` is [rows, heads, 1, d], `key` and `value` [rows, key-value heads, length, d], the mask
    [rows, 1, 1, length]. Returns [rows, 1, heads, d].
    """
    rows, heads, queries, size = query.shape
    shared = key.shape[1]
    if queries > 1 or heads == shared or dropout or options.get("position_bias") is not None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    grouped = query.reshape(rows, shared, heads // shared, size)  # neighbouring heads share a key
    output = torch.nn.functional.scaled_dot_product_attention(
        grouped, key, value, attn_mask=attention_mask, scale=scaling
    )
    return output.reshape(rows, 1, heads, value.shape[-1]), None


@contextmanager
def grouped_attention(model: PreTrainedModel) -> Iterator[None]:
    """Decode with `_grouped_sdpa` inside the context, if the model uses "sdpa"."""
    if model.config._attn_implementation != "sdpa":
        yield
        return
    AttentionInterface.register(_ATTENTION, _grouped_sdpa)
    AttentionMaskInterface.register(_ATTENTION, sdpa_mask)
    model.set_attn_implementation(_ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation("sdpa")


class _RoomyLayer(DynamicLayer):
    """A `DynamicLayer` whose `keys` and `values` are views into longer tensors."""

    def __init__(self) -> None:
        super().__init__()
        self._room: list[torch.Tensor | None] = [None, None]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add states [rows, heads, further, d]; return the states of all tokens."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._append(0, self.keys, key_states)
        self.values = self._append(1, self.values, value_states)
        return self.keys, self.values

    def _append(
        self, index: int, states: torch.Tensor | None, further: torch.Tensor
    ) -> torch.Tensor:
        """Return `states` and then `further`; no copy if `states` are in the longer tensor."""
        room = self._room[index]
        start = states.shape[-2] if states is not None and states.numel() else 0
        end = start + further.shape[-2]
        inside = room is not None and states is not None and room.data_ptr() == states.data_ptr()
        if room is None or not inside or room.shape[-2] < end:
            room = further.new_empty(*further.shape[:-2], end + _ROOM, further.shape[-1])
            if states is not None and start:
                room[..., :start, :] = states
        room[..., start:end, :] = further
        self._room[index] = room
        return room[..., :end, :]


def _roomy_cache(config: PreTrainedConfig) -> DynamicCache:
    """Return a `DynamicCache` with `_RoomyLayer`s; sliding windows stay as they are."""
    cache = DynamicCache(config=config)
    cache.layers = [
        _RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    return cache
