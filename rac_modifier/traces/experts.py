"""Tokens that each expert of a mixture of experts reads from traces."""

import math
from collections.abc import Iterable

import torch
from transformers import PreTrainedModel

from rac_modifier.errors import RacError
from rac_modifier.model_tools import evaluating
from rac_modifier.traces.records import Trace

ENOUGH = 512  # the default of `expert_floor`


@torch.no_grad()
def tokens_per_expert(
    model: PreTrainedModel, traces: Iterable[Trace], most: int
) -> tuple[torch.Tensor, int]:
    """Count the tokens that each expert reads of the first `most` tokens.

    Shared experts read every token and are not counted.

    Returns:
        Counts [layers, experts], and the number of tokens.

    Raises:
        RacError: the model routes within groups or returns no router logits; no traces.
    """
    config = model.config.get_text_config()
    active: int = getattr(config, "num_experts_per_tok", 0)
    if (getattr(config, "n_group", None) or 1) > 1:
        raise RacError(
            f"{type(model).__name__} routes within {config.n_group} groups of experts (n_group), "
            "which cannot be counted; leave --experts out"
        )
    counts: torch.Tensor | None = None
    tokens = 0
    with evaluating(model):
        for trace in traces:
            if tokens >= most:
                break
            ids = torch.tensor([[*trace.prompt_ids, *trace.completion_ids]], device=model.device)
            routers = _router_logits(model, ids[:, : most - tokens]) if active else ()
            if not routers:
                raise RacError(
                    f"{type(model).__name__} returns no router logits; leave --experts out"
                )
            chosen = torch.stack([logits.flatten(0, -2).topk(active).indices for logits in routers])
            experts = routers[0].shape[-1]
            rows = [layer.flatten().bincount(minlength=experts).cpu() for layer in chosen]
            counts = torch.stack(rows) + (0 if counts is None else counts)
            tokens += chosen.shape[1]
    if counts is None:
        raise RacError("the store holds no traces; collect some first (rac traces collect)")
    return counts, tokens


def _router_logits(model: PreTrainedModel, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    try:
        output = model(input_ids=ids, output_router_logits=True)
    except TypeError:  # a model without experts has no such argument
        return ()
    return tuple(output.get("router_logits") or ())


def describe_experts(counts: torch.Tensor, tokens: int) -> list[str]:
    """Describe `tokens_per_expert` in two lines: the extremes, and the budget that is enough."""
    layers, experts = counts.shape
    layer, expert = divmod(int(counts.argmin()), experts)
    least, largest = int(counts.min()), int(counts.max())
    if least == 0:
        unread = int((counts == 0).sum())
        budget = f"{unread:,} read nothing: collect more traces, or of other problems"
    else:
        budget = f"{math.ceil(tokens * ENOUGH / least):,} tokens give every expert {ENOUGH}"
    return [
        f"experts     {experts} in each of {layers} layers; an expert reads {least:,} "
        f"(expert {expert} of layer {layer}) to {largest:,} of {tokens:,} tokens",
        f"budget      {budget}",
    ]
