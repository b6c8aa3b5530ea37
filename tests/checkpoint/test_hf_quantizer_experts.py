"""Packed experts in `from_pretrained`, which merges them."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rac_modifier.checkpoint.packing import pack_checkpoint
from rac_modifier.errors import RacError
from rac_modifier.formats.words import PackQuantized
from tests.checkpoint.checkpoint_helpers import (
    SCHEMES,
    assert_same_state,
    edited,
    edited_config,
    prune_half,
    stock,
)
from tests.tiny import save_tiny_experts


def mixture_of_experts(folder: Path, packed: str) -> dict[str, torch.Tensor]:
    """Save tiny experts, pack the modules with `packed` in their names; what stock loads of it."""
    save_tiny_experts(folder, num_hidden_layers=1)
    with edited(folder) as tensors:
        names = [
            n.removesuffix(".weight") for n in tensors if packed in n and n.endswith("proj.weight")
        ]
        for name in names:
            prune_half(tensors[f"{name}.weight"])
    expected = {name: tensor.clone() for name, tensor in stock(folder).state_dict().items()}
    if names:
        pack_checkpoint(folder, dict.fromkeys(names, "unstructured"), ["lm_head"])
    return expected


@pytest.mark.parametrize(
    ("packed", "dtype"),
    [("proj", torch.bfloat16), ("experts.1", torch.float32), ("self_attn", torch.float32)],
)
def test_experts_are_unpacked_before_they_are_merged(tmp_path, packed, dtype):
    """Of packed attention alone, transformers would leave the experts in the file's dtype."""
    expected = mixture_of_experts(tmp_path / "a", packed)
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "a", dtype=dtype, output_loading_info=True
    )
    assert not any(info.values())
    assert_same_state(model, {name: tensor.to(dtype) for name, tensor in expected.items()})
    model.save_pretrained(tmp_path / "b")
    assert_same_state(
        stock(tmp_path / "b"), {name: tensor.to(dtype) for name, tensor in expected.items()}
    )


def test_a_damaged_expert_is_named(tmp_path):
    mixture_of_experts(tmp_path, "experts")
    with edited(tmp_path) as tensors:
        name = "model.layers.0.mlp.experts.2.up_proj.bitmask"
        tensors[name] = torch.zeros_like(tensors[name])
    with pytest.raises(RacError, match=r"^model\.layers\.0\.mlp\.experts\.2\.up_proj\.row_offsets"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("scheme", ["fp8", "w4"])
def test_quantized_experts_are_multiplied_with_their_scales(tmp_path, scheme):
    """Upstream's own operation does it, on the codes that were unpacked."""
    mixture_of_experts(tmp_path, "nothing")
    tensors, modules = load_file(tmp_path / "model.safetensors"), {}
    experts = [n for n in tensors if "experts" in n and n.endswith("proj.weight")]
    for name in (n.removesuffix(".weight") for n in experts):
        weight = tensors.pop(f"{name}.weight").float()
        prune_half(weight)
        modules[name] = "unstructured"
        groups = 1 if scheme == "fp8" else weight.shape[1] // 16
        scale = torch.full((len(weight), groups), 2.0**-7)
        codes = weight / scale.repeat_interleave(weight.shape[1] // groups, dim=1)
        if scheme == "fp8":
            tensors[f"{name}.weight"] = codes.to(torch.float8_e4m3fn)
        else:
            words = PackQuantized.compress(codes.round().clamp(-8, 7).to(torch.int8), 4)
            tensors |= {f"{name}.{part}": tensor for part, tensor in words.items()}
        tensors[f"{name}.weight_scale"] = scale.bfloat16()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    group = copy.deepcopy(SCHEMES[scheme])
    if scheme == "w4":
        group["weights"]["group_size"] = 16
    with edited_config(tmp_path) as config:
        config["quantization_config"] = {
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
            "format": {"fp8": "float-quantized", "w4": "pack-quantized"}[scheme],
            "config_groups": {"group_0": {"targets": ["re:.*experts.*"], **group}},
        }
    expected = {name: tensor.clone() for name, tensor in stock(tmp_path).state_dict().items()}
    pack_checkpoint(tmp_path, modules, ["lm_head"])
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert_same_state(model, expected)
