"""Attention for one new token per row, without copying keys and values once per query head.

Where query heads share key-value heads (grouped-query attention) and rows are padded, transformers' "sdpa" repeats the whole
cache at every step. With one query per head, the heads of a group can instead be the queries of one product, which needs no
copy: benchmarks/decode_speed.py measures it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

_NAME = "rac_grouped_sdpa"


def grouped_sdpa(
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
    """As transformers' `sdpa_attention_forward`, to which everything but the case of one query per head is left.

    `query` is [rows, heads, 1, d], `key` and `value` [rows, key-value heads, length, d], the mask broadcasts to
    [rows, 1, 1, length]. Returns [rows, 1, heads, d].
    """
    rows, heads, queries, size = query.shape
    shared = key.shape[1]
    if queries > 1 or heads == shared or dropout or options.get("position_bias") is not None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    grouped = query.reshape(
        rows, shared, heads // shared, size
    )  # neighbouring query heads share a key-value head
    output = torch.nn.functional.scaled_dot_product_attention(
        grouped, key, value, attn_mask=attention_mask, scale=scaling
    )
    return output.reshape(rows, 1, heads, value.shape[-1]), None


@contextmanager
def grouped_attention(model: PreTrainedModel) -> Iterator[None]:
    """Decode with `grouped_sdpa` where the model uses "sdpa"; any other attention stays as it is."""
    if model.config._attn_implementation != "sdpa":
        yield
        return
    AttentionInterface.register(_NAME, grouped_sdpa)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    model.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation("sdpa")
