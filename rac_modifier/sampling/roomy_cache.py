"""A key-value cache with room for further tokens, so that a step does not copy what is already there.

transformers' `DynamicCache` joins the whole cache and the new token at every step. Over a completion of n tokens that copies
n² / 2 of them, a share of its time that grows with its length. benchmarks/decode_speed.py measures it.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

_ROOM = 128  # further tokens for which memory is taken each time that there is none left


class _Growing:
    """States [rows, heads, length, d] at the start of a longer tensor."""

    def __init__(self) -> None:
        self._whole: torch.Tensor | None = None
        self._filled: torch.Tensor | None = None

    def append(self, states: torch.Tensor | None, further: torch.Tensor) -> torch.Tensor:
        """`states` and behind them `further`; without a copy where `states` is what the last call returned."""
        start = 0 if states is None or not states.numel() else states.shape[-2]
        end = start + further.shape[-2]
        whole = (
            self._whole if states is self._filled else None
        )  # rows may have been taken out meanwhile
        if whole is None or whole.shape[-2] < end:
            whole = further.new_empty(*further.shape[:-2], end + _ROOM, further.shape[-1])
            if states is not None and start:
                whole[..., :start, :] = states
        whole[..., start:end, :] = further
        self._whole, self._filled = whole, whole[..., :end, :]
        return self._filled


class RoomyLayer(DynamicLayer):
    """As `DynamicLayer`; `keys` and `values` are views into longer tensors."""

    def __init__(self) -> None:
        super().__init__()
        self._growing_keys, self._growing_values = _Growing(), _Growing()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add the states of further tokens, [rows, heads, further, d]; returns those of all tokens."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._growing_keys.append(self.keys, key_states)
        self.values = self._growing_values.append(self.values, value_states)
        return self.keys, self.values


def roomy_cache(config: PreTrainedConfig) -> DynamicCache:
    """A `DynamicCache` whose plain layers are `RoomyLayer`s; sliding windows and all others stay as they are."""
    cache = DynamicCache(config=config)
    cache.layers = [
        RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    return cache
