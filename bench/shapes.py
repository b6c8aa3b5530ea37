"""Models in the shape of Qwen2 or Qwen3-MoE with random weights, in any form that we serve."""

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, Qwen2Config, Qwen3MoeConfig

from bench.common import RAC
from rac_modifier.formats.quantization_config import with_int8_activations

SHAPES = {  # rows and columns of qkv, o, gate_up and down, as vLLM fuses them
    "1.5B": [(2048, 1536), (1536, 1536), (17920, 1536), (1536, 8960)],
    "7B": [(4608, 3584), (3584, 3584), (37888, 3584), (3584, 18944)],
}
_SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
QWEN2: dict[str, dict[str, int]] = {
    "1.5B": dict(zip(_SIZES, (1536, 8960, 12, 2), strict=True)),
    "7B": dict(zip(_SIZES, (3584, 18944, 28, 4), strict=True)),
}
MIXTURE = {  # Qwen3-30B-A3B
    "hidden_size": 2048,
    "moe_intermediate_size": 768,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
}
GROUP = {4: 128, 3: 64}  # columns that share a scale, by bits
HEAD_GROUP = None  # a scale per row
CHUNK = 1 << 13  # rows that are packed at a time
KEEP_16_BITS = ("q_proj", "k_proj", "v_proj")  # as a run chose on SmolLM2 in int4


@dataclass(frozen=True)
class Form:
    """How a linear layer's weights are stored: `pruned` share or "2:4" (0.0: dense), and bits.

    `vllm`: vLLM's own kernels run it. `activations`: bits of the activations that integer
    kernels multiply.
    """

    text: str
    pruned: float | str = 0.0
    bits: int = 16
    activations: int = 16
    vllm: bool = False

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read "bf16", "w8a8", "w4a16" (vLLM's), "int4", "50%-bf16", "50%-int8-8" (x int8)."""
        if bits := {"bf16": 16, "w8a8": 8, "w4a16": 4}.get(text):
            return cls(text, bits=bits, vllm=True)
        match = re.fullmatch(r"(?:(\d+%|\d+:\d+)-)?(bf16|int8|int4|int3)(-8)?", text)
        if match is None or (match[1] is None and match[2] in ("bf16", "int8")):
            known = "bf16, w8a8, w4a16, int4, int3, 50%-bf16, 2:4-int8 or 50%-int4-8"
            raise SystemExit(f'form "{text}": write {known}')
        pruned: float | str = 0.0
        if match[1]:
            pruned = match[1] if ":" in match[1] else int(match[1][:-1]) / 100
        bits = {"bf16": 16, "int8": 8, "int4": 4, "int3": 3}[match[2]]
        return cls(text, pruned, bits, 8 if match[3] else 16)

    @property
    def group(self) -> int | None:
        """Columns that share a scale; None: one scale per row."""
        return GROUP.get(self.bits)


def random_mask(rows: int, columns: int, pruned: float | str) -> Tensor:
    """Return a bool mask [rows, columns], True where a weight is kept."""
    if isinstance(pruned, str):
        n, width = (int(number) for number in pruned.split(":"))
        order = torch.rand(rows, columns // width, width).argsort(-1)
        return (order < width - n).view(rows, columns)
    return torch.rand(rows, columns) >= pruned


def rounded(weight: Tensor, bits: int, group: int | None) -> tuple[Tensor, Tensor]:
    """Round a weight [N, K] to a symmetric grid: int8 [N, K], bfloat16 scales [N, groups].

    Zeros stay zero, and other weights never become zero, so that the density stays.
    """
    groups = weight.float().view(len(weight), -1, group or weight.shape[1])
    most = 2 ** (bits - 1) - 1
    scale = (groups.abs().amax(-1) / most).clamp_min(1e-30).bfloat16()
    values = (groups / scale.float()[:, :, None]).round().clamp(-most, most).to(torch.int8)
    values = torch.where((values == 0) & (groups != 0), groups.sign().to(torch.int8), values)
    return values.view(weight.shape), scale


def packed_words(values: Tensor, bits: int) -> Tensor:
    """Pack int8 values [N, K] as compressed-tensors does: int32 [N, K bits / 32]."""
    words = []
    for rows in values.split(CHUNK):
        codes = (rows.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8).numpy()
        stream = (codes[:, :, None] >> np.arange(bits, dtype=np.uint8)) & 1
        packed = np.packbits(stream.reshape(len(rows), -1), axis=1, bitorder="little")
        words.append(torch.from_numpy(packed.view(np.int32)))
    return torch.cat(words)


def config_of(shape: str, **common: Any) -> PreTrainedConfig:
    """Return the config of Qwen2-1.5B ("1.5B") or Qwen3-30B-A3B ("30B-A3B")."""
    if shape == "30B-A3B":
        return Qwen3MoeConfig(architectures=["Qwen3MoeForCausalLM"], **MIXTURE, **common)
    return Qwen2Config(architectures=["Qwen2ForCausalLM"], **QWEN2[shape], **common)


def random_model(folder: Path, form: Form, layers: int, vocab: int, shape: str = "1.5B") -> Path:
    """Save a model with random weights, stored in a form; return its folder.

    Integer forms of ours have the int8 head of `rac_w4a16`. Nothing is done if the folder exists.
    """
    out = folder / f"{shape}-{re.sub('[^a-z0-9]', '-', form.text)}-{layers}-layers-{vocab}"
    if out.exists():
        return out
    torch.manual_seed(0)
    integers = form.bits < 16
    own_head = integers and not form.vllm
    config = config_of(
        shape,
        vocab_size=vocab,
        num_hidden_layers=layers,
        max_position_embeddings=4096,
        tie_word_embeddings=not own_head,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    state = split_experts(model.state_dict())
    if not own_head:
        del state["lm_head.weight"]
    linears = [name.removesuffix(".weight") for name in state if name.endswith("proj.weight")]
    for name in linears:
        weight = state.pop(f"{name}.weight")
        weight = weight * random_mask(*weight.shape, form.pruned)
        if integers:
            state |= stored(name, weight, form.bits, form.group, words=form.text != "w8a8")
        else:
            state[f"{name}.weight"] = weight
    if own_head:
        state |= stored("lm_head", state.pop("lm_head.weight"), 8, HEAD_GROUP)
    if integers:
        config.quantization_config = quantization(form)
    unfinished = out.with_name(out.name + ".unfinished")
    config.save_pretrained(unfinished)
    save_torch_state_dict(state, unfinished, max_shard_size="1GB", metadata={"format": "pt"})
    if form.pruned:
        command = [*RAC, "pack", str(unfinished), str(out)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        shutil.rmtree(unfinished)
    else:
        unfinished.rename(out)
    if form.activations == 8:
        path = out / "config.json"
        eight = [name for name in linears if name.rpartition(".")[2] not in KEEP_16_BITS]
        content = with_int8_activations(json.loads(path.read_text()), eight)
        path.write_text(json.dumps(content))
    return out


def split_experts(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of each expert on its own, as checkpoints have them."""
    split: dict[str, Tensor] = {}
    for name, tensor in state.items():
        layer, _, kind = name.rpartition(".")
        if tensor.dim() < 3:
            split[name] = tensor
            continue
        for number, expert in enumerate(tensor):
            names = ["gate_proj", "up_proj"] if kind == "gate_up_proj" else [kind]
            for part, weight in zip(names, expert.chunk(len(names)), strict=True):
                split[f"{layer}.{number}.{part}.weight"] = weight.clone()
    return split


def stored(
    name: str, weight: Tensor, bits: int, group: int | None, words: bool = True
) -> dict[str, Tensor]:
    """Return a weight as compressed-tensors stores it: in words or int8 values, and scales."""
    values, scale = rounded(weight, bits, group)
    if not words:
        return {f"{name}.weight": values, f"{name}.weight_scale": scale}
    tensors = {"packed": packed_words(values, bits), "scale": scale}
    tensors["shape"] = torch.tensor(weight.shape)
    return {f"{name}.weight_{part}": tensor for part, tensor in tensors.items()}


def quantization(form: Form) -> dict[str, Any]:
    """Return the `quantization_config` of a form."""

    def scheme(bits: int, group: int | None) -> dict[str, Any]:
        weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "channel"}
        if group is not None:
            weights |= {"strategy": "group", "group_size": group}
        inputs = None
        if form.vllm and bits == 8:
            inputs = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
        format = "int-quantized" if inputs else "pack-quantized"
        return {"weights": weights, "input_activations": inputs, "format": format}

    layers = scheme(form.bits, form.group)
    groups = {"layers": {"targets": ["Linear"], **layers}}
    if not form.vllm:
        groups["head"] = {"targets": ["re:.*lm_head"], **scheme(8, HEAD_GROUP)}
    return {
        "quant_method": "compressed-tensors",
        "format": layers["format"],
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [r"re:.*mlp\.gate$", *(["lm_head"] if form.vllm else [])],
    }
