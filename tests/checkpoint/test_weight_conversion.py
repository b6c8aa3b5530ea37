"""Converters on their own, and those of a mixture of experts in `from_pretrained`."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
)

from rac_modifier.checkpoint.formats import pack
from rac_modifier.checkpoint.packing import pack_checkpoint
from rac_modifier.checkpoint.quantization_config import to_words
from rac_modifier.checkpoint.weight_conversion import (
    Unpack,
    UnpackExperts,
    conversions_for_saving,
    updated_conversions,
)
from rac_modifier.errors import RacError
from tests.checkpoint.checkpoint_helpers import (
    SCHEMES,
    assert_same_state,
    edited,
    edited_config,
    prune_half,
    stock,
)

MATRIX = "layers.0.up_proj"


def half_pruned(dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    weight = torch.randint(-7, 8, (4, 16), generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[:, ::2] = 0
    return weight


def converted(
    weight: torch.Tensor, target: str, bits: int | None = None, dtype: torch.dtype = torch.bfloat16
) -> tuple:
    """What the operation makes of a packed weight, and the operation."""
    unpack = Unpack("sparse-bitmask", {f"{MATRIX}.weight": dtype})
    parts = {
        rf"\.{part}$": [tensor]
        for part, tensor in pack(weight, "sparse-bitmask", "x", bits).items()
    }
    model = SimpleNamespace(get_parameter_or_buffer=lambda name: torch.empty(4, 16))
    return unpack.convert(parts, [], [], full_layer_name=f"{MATRIX}.{target}", model=model), unpack


@pytest.mark.parametrize("bits", [4, None])
def test_words_as_upstream_packs_them(bits: int | None) -> None:
    upstream = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    found, _ = converted(half_pruned(torch.int8), "weight_packed", bits)
    assert torch.equal(
        found[f"{MATRIX}.weight_packed"], upstream.pack_to_int32(half_pruned(torch.int8), bits or 8)
    )
    assert found[f"{MATRIX}.weight_shape"].tolist() == [4, 16]


def test_modules_in_words_are_matched_by_their_names() -> None:
    of_words, of_weights = updated_conversions([], Unpack("sparse-24-bitmask", {}), ["a.b+", "c"])
    assert of_words.rename_source_key("a.b+.bitmask")[0] == "a.b+.weight_packed"
    assert of_words.rename_source_key("c.shape")[0] == "c.weight_packed"
    for other in ("a.bb.bitmask", "x.c.shape", "c.row_offsets"):
        assert of_words.rename_source_key(other) == (other, None)
    assert of_weights.rename_source_key("x.c.shape")[0] == "x.c.weight"
    assert of_weights.rename_source_key("x.weight_shape") == ("x.weight_shape", None)


def experts_converter() -> WeightConverter:
    sources = ["experts.*.gate_proj.weight", "experts.*.up_proj.weight"]
    return WeightConverter(
        sources, "experts.gate_up_proj", operations=[MergeModulelist(dim=0), Concatenate(dim=1)]
    )


def test_other_conversions_are_left_and_come_back_for_saving() -> None:
    renaming, plain = (
        WeightRenaming("a", "b"),
        WeightConverter("q", "p", operations=[Concatenate(dim=0)]),
    )
    experts = experts_converter()
    updated = updated_conversions([renaming, experts, plain], Unpack("sparse-bitmask", {}), ["c"])
    assert updated[0] is renaming
    assert isinstance(updated[1], UnpackExperts)
    assert updated[2] is plain
    assert len(updated) == 5
    assert conversions_for_saving(updated) == [renaming, experts, plain]


def mixture_of_experts(folder: Path, packed: str) -> dict[str, torch.Tensor]:
    """Save a tiny mixture of experts whose modules with `packed` in their names are packed; what stock loads of it."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, moe_intermediate_size=16, num_experts=3, num_experts_per_tok=2,
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=16, tie_word_embeddings=False,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config).bfloat16()
    model.config.dtype = torch.bfloat16
    model.save_pretrained(folder)
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("packed", ["proj", "experts", "self_attn"])
def test_experts_are_unpacked_before_they_are_merged(
    tmp_path: Path, packed: str, dtype: torch.dtype
) -> None:
    """Where only the attention is packed, transformers renames the experts and would leave them in the file's dtype."""
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


def test_a_damaged_expert_is_named(tmp_path: Path) -> None:
    mixture_of_experts(tmp_path, "experts")
    with edited(tmp_path) as tensors:
        name = "model.layers.0.mlp.experts.2.up_proj.bitmask"
        tensors[name] = torch.zeros_like(tensors[name])
    with pytest.raises(
        RacError, match=r"^model\.layers\.0\.mlp\.experts\.gate_up_proj of expert 2\.compressed"
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_experts_of_which_some_are_packed_cannot_be_merged(tmp_path: Path) -> None:
    mixture_of_experts(tmp_path, "experts.1")
    with pytest.raises(RacError, match="some of its experts are packed and some are stored dense"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("scheme", ["fp8", "w4"])
def test_quantized_experts_are_multiplied_with_their_scales(tmp_path: Path, scheme: str) -> None:
    """Upstream's own operation does it, on the codes that were unpacked."""
    mixture_of_experts(tmp_path, "nothing")
    tensors, modules = load_file(tmp_path / "model.safetensors"), {}
    for name in [
        n.removesuffix(".weight") for n in tensors if "experts" in n and n.endswith("proj.weight")
    ]:
        weight = tensors.pop(f"{name}.weight").float()
        prune_half(weight)
        modules[name] = "unstructured"
        groups = 1 if scheme == "fp8" else weight.shape[1] // 16
        scale = torch.full((len(weight), groups), 2.0**-7)
        codes = weight / scale.repeat_interleave(weight.shape[1] // groups, dim=1)
        if scheme == "fp8":
            tensors[f"{name}.weight"] = codes.to(torch.float8_e4m3fn)
        else:
            words = to_words(codes.round().clamp(-8, 7).to(torch.int8), 4)
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
    assert model.model.layers[0].mlp.experts.down_proj.dtype == torch.bfloat16


def test_codes_of_experts_without_their_config_group_are_not_taken_for_weights(
    tmp_path: Path,
) -> None:
    mixture_of_experts(tmp_path, "nothing")
    tensors, modules = load_file(tmp_path / "model.safetensors"), {}
    for name in [
        n.removesuffix(".weight") for n in tensors if "experts" in n and n.endswith("proj.weight")
    ]:
        tensors[f"{name}.weight"] = torch.ones_like(tensors[f"{name}.weight"], dtype=torch.int8)
        modules[name] = "unstructured"
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    pack_checkpoint(tmp_path, modules, ["lm_head"])
    with pytest.raises(RacError, match=r"weight_scale: missing, but its values are torch\.int8"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
