"""A model of the shape of Qwen2-1.5B with random weights, dense or packed sparse. Speed does not depend on the weights."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from rac_modifier.checkpoint.int32_words import pack_words
from rac_modifier.checkpoint.packing import pack_checkpoint
from rac_modifier.checkpoint.round_to_nearest import quantize_rows
from rac_modifier.settings.pattern import Pattern

GROUPS = {4: 128, 3: 64}  # columns that share a scale, by bits


def save_model(
    folder: Path,
    layers: int,
    vocab: int,
    pattern: Pattern | None,
    int8: bool = False,
    codes: int | None = None,
    narrow: bool = False,
) -> None:
    """Save the model in bfloat16, tied embeddings; with a `pattern`, its linear layers pruned at random and packed.

    `int8`: these layers are also rounded to int8, with one scale per row. `codes`: to 4 or 3 bits, with bfloat16 scales
    of groups of 128 or 64 columns. Without a pattern these are ordinary W8A8 and W4A16 checkpoints. `narrow`: of 256 columns,
    so that products take next to no time. Nothing is written if the folder exists.
    """
    if folder.exists():
        return
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocab,
        hidden_size=256 if narrow else 1536,
        intermediate_size=512 if narrow else 8960,
        num_hidden_layers=layers,
        num_attention_heads=2 if narrow else 12,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        architectures=["Qwen2ForCausalLM"],
    )
    model = Qwen2ForCausalLM._from_config(config, dtype=torch.bfloat16)
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    linears.pop("lm_head")
    if pattern is not None:
        for module in linears.values():
            module.weight.data.masked_fill_(random_zeros(module.weight, pattern), 0)
    unfinished = folder.with_name(folder.name + ".unfinished")
    state = model.state_dict()
    if int8:
        for name in linears:
            values, scale = quantize_rows(state[f"{name}.weight"])
            state |= {f"{name}.weight": values, f"{name}.weight_scale": scale}
        weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
        inputs = {**weights, "strategy": "token", "dynamic": True}
        model.config.quantization_config = {
            "quant_method": "compressed-tensors",
            "format": "int-quantized",
            "quantization_status": "compressed",
            "config_groups": {
                "group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
            },
            "ignore": ["lm_head"],
        }
    if codes is not None:
        for name in linears:
            weight = state.pop(f"{name}.weight")
            values, scale = rounded_groups(weight, codes)
            shape = torch.tensor(weight.shape)
            state |= {
                f"{name}.weight_packed": pack_words(values, 4)
                if codes == 4
                else pack_three(values),
                f"{name}.weight_scale": scale,
                f"{name}.weight_shape": shape,
            }
        grid = {
            "num_bits": codes,
            "type": "int",
            "symmetric": True,
            "strategy": "group",
            "group_size": GROUPS[codes],
        }
        model.config.quantization_config = {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": grid}},
            "ignore": ["lm_head"],
        }
    model.save_pretrained(unfinished, state_dict=state, max_shard_size="1GB")
    if pattern is not None:
        structure = f"{pattern.n}:{pattern.m}" if pattern.is_structured else "unstructured"
        pack_checkpoint(unfinished, dict.fromkeys(linears, structure), dense_linears=["lm_head"])
    unfinished.rename(folder)


def rounded_groups(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """A weight [N, K] rounded to `bits`, symmetric: int8 values, and scales bfloat16 [N, K / group]; zeros stay zero."""
    groups, most = weight.float().view(len(weight), -1, GROUPS[bits]), (1 << (bits - 1)) - 1
    scale = (groups.abs().amax(dim=-1) / most).bfloat16()
    values = (
        (groups / scale.float().clamp_min(1e-30)[:, :, None])
        .round()
        .clamp(-most, most)
        .to(torch.int8)
    )
    values = torch.where(
        (values == 0) & (groups != 0), groups.sign().to(torch.int8), values
    )  # so that the density stays
    return values.view(weight.shape), scale


def pack_three(values: Tensor) -> Tensor:
    """Int8 [N, K] of 3 bits as int32 [N, 3 K / 32], bit after bit; compressed-tensors 0.17, of vLLM 0.32, packs otherwise."""
    codes = (values + 4).view(len(values), -1, 8).int()
    eight = (codes << torch.arange(0, 24, 3, dtype=torch.int32)).sum(-1, dtype=torch.int32)
    return (
        torch.stack([eight >> at & 255 for at in (0, 8, 16)], dim=-1)
        .to(torch.uint8)
        .flatten(1)
        .view(torch.int32)
    )


def random_zeros(weight: Tensor, pattern: Pattern) -> Tensor:
    """Bool mask [N, K] of the weights to prune: random ones, or exactly n of every m columns."""
    if not pattern.is_structured:
        return torch.rand(weight.shape) < pattern.sparsity
    groups = torch.rand(weight.shape[0], weight.shape[1] // pattern.m, pattern.m)
    pruned = groups.topk(pattern.n, dim=-1).indices
    return torch.zeros(groups.shape, dtype=torch.bool).scatter_(-1, pruned, True).view(weight.shape)


def size_on_disk(folder: Path) -> int:
    """Bytes of its weight files."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
