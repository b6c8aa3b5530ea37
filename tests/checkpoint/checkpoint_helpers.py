from __future__ import annotations

import torch
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM


def tiny_model(tied: bool = True, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    config = Qwen3Config(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        tie_word_embeddings=tied,
        max_position_embeddings=128,
    )
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config).to(dtype)
    model.config.dtype = dtype
    model.generation_config.eos_token_id = 7
    return model


def linears(model: PreTrainedModel) -> dict[str, torch.nn.Linear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"}


def prune_24(weight: torch.Tensor) -> None:
    groups = weight.view(-1, 4)
    groups.scatter_(1, groups.abs().float().topk(2, dim=1, largest=False).indices, 0.0)


def prune_half(weight: torch.Tensor) -> None:
    weight[torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.5] = 0.0


PRUNERS = {"2:4": prune_24, "unstructured": prune_half}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
    )
