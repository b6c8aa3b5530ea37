"""Decode a batch whose rows end at different times: rows that have ended are taken out of the batch.

The longest chain of thought of a batch is often several times as long as the shortest, and `model.generate` computes every row
until the last has ended. Without the ended rows, the cost of a batch is about proportional to its tokens.
"""

from __future__ import annotations

import inspect

import torch
from transformers import PreTrainedModel

from rac_modifier.sampling.draw import Draw
from rac_modifier.sampling.roomy_cache import roomy_cache

# Rows are taken out once a quarter of those in the batch have ended, not at once, since that copies the key-value cache.
_KEPT_BELOW = 0.75


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
    """Complete left-padded prompts; returns the new tokens of each row, up to its limit, not yet cut at its EOS.

    Args:
        model: a causal LM in evaluation mode that takes position_ids and a DynamicCache.
        prompts: token ids, none empty.
        limits: the most new tokens of each row.
        eos: ids that end a row.
        pad: id of the padding.
        draw: temperature, top-k, top-p.
        rows: int64 key of each row for its noise (`row_noise.row_keys`).
    """
    device, width = model.device, max(map(len, prompts))
    inputs = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    cache = roomy_cache(model.config)
    only_last = (
        {"logits_to_keep": 1}
        if "logits_to_keep" in inspect.signature(model.forward).parameters
        else {}
    )
    ends, longest = torch.tensor(eos, device=device), torch.tensor(limits, device=device)
    output = torch.full((len(prompts), max(limits)), pad, device=device)
    present = torch.arange(
        len(prompts), device=device
    )  # which prompt each row of the batch completes
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
        left = int(running.sum())
        if left == 0:
            break
        inputs, positions = tokens[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, torch.ones_like(inputs)], dim=1)
        if left <= _KEPT_BELOW * len(running):
            kept = running.nonzero().squeeze(1)
            cache.batch_select_indices(kept)
            inputs, positions, mask, present = (
                inputs[kept],
                positions[kept],
                mask[kept],
                present[kept],
            )
            rows, running = rows[kept], running[kept]
    return [row[:limit] for row, limit in zip(output.tolist(), limits, strict=True)]
