"""Packed checkpoints in `from_pretrained`, against dense ones in stock transformers."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM
from transformers.utils.quantization_config import CompressedTensorsConfig

from rac_modifier.checkpoint.packing import pack_checkpoint
from tests.checkpoint.checkpoint_helpers import (
    Q,
    assert_same_state,
    config_of,
    save_quantized,
    stock,
    tiny_model,
)

IDS = torch.tensor([[1, 2, 3]])


@pytest.mark.parametrize(
    ("structure", "shard", "tied", "dtype"),
    [
        ("2:4", None, True, torch.bfloat16),
        ("unstructured", "60KB", False, torch.float32),
    ],
)
def test_bit_identical(saved, structure, shard, tied, dtype):
    folder, expected, _ = saved(structure, tied=tied, shard=shard, dtype=dtype)
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    assert_same_state(model, expected)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert not model.training
    assert model.dtype == dtype
    assert model.generation_config.eos_token_id == 7
    assert model.config._name_or_path == model.name_or_path == str(folder)
    assert model(IDS).logits.isfinite().all()


@pytest.mark.parametrize(
    ("scheme", "options"), [("w8a8", {}), ("fp8", {}), ("w4", {}), ("w4", {"dequantize": True})]
)
def test_a_quantized_checkpoint_is_loaded_as_before_and_packed_too(tmp_path, scheme, options):
    modules = save_quantized(tmp_path, "2:4", scheme)
    given = {"quantization_config": CompressedTensorsConfig(**options)} if options else {}
    before = stock(tmp_path, **given)
    after = AutoModelForCausalLM.from_pretrained(tmp_path, **given)
    expected = {name: tensor.clone() for name, tensor in before.state_dict().items()}
    assert_same_state(after, expected)
    assert after.config.to_dict() == before.config.to_dict()
    assert hasattr(after, "hf_quantizer") == hasattr(before, "hf_quantizer")
    pack_checkpoint(tmp_path, modules, ["lm_head"])
    packed = AutoModelForCausalLM.from_pretrained(tmp_path, **given)
    assert_same_state(packed, expected)
    logits = before(IDS).logits
    assert torch.equal(after(IDS).logits, logits)
    assert torch.equal(packed(IDS).logits, logits)


def test_quantized_and_plain_packed_modules_in_one_model(tmp_path):
    """int32 words become `weight_packed`, the others `weight`."""
    modules = save_quantized(tmp_path, "2:4", "w4")
    config, tensors = config_of(tmp_path), load_file(tmp_path / "model.safetensors")
    plain = [name for name in modules if ".mlp." in name]
    for name in plain:
        rows, columns = tensors.pop(f"{name}.weight_shape").tolist()
        del tensors[f"{name}.weight_packed"], tensors[f"{name}.weight_scale"]
        tensors[f"{name}.weight"] = torch.arange(rows * columns).view(rows, columns).bfloat16()
        tensors[f"{name}.weight"].view(-1, 4)[:, :2] = 0
    config["quantization_config"]["ignore"] += plain
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    expected = {name: tensor.clone() for name, tensor in stock(tmp_path).state_dict().items()}
    pack_checkpoint(tmp_path, modules, ["lm_head"])
    assert_same_state(AutoModelForCausalLM.from_pretrained(tmp_path), expected)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"dtype": "auto", "device_map": "auto"},
        {"device_map": {"model": "cpu", "lm_head": "cpu"}, "dtype": torch.float32},
    ],
    ids=str,
)
def test_dtype_and_device_map_are_honoured(saved, kwargs):
    folder, expected, _ = saved(tied=False)
    model = AutoModelForCausalLM.from_pretrained(folder, **kwargs)
    dtype = torch.bfloat16 if kwargs["dtype"] == "auto" else kwargs["dtype"]
    assert_same_state(model, {name: tensor.to(dtype) for name, tensor in expected.items()})


def test_a_module_that_stays_in_float32(saved, monkeypatch):
    """As some models ask for; the bits of the file are not rounded to float16 on the way."""
    folder, expected, _ = saved(tied=False)
    monkeypatch.setattr(type(tiny_model()), "_keep_in_fp32_modules", ["q_proj"])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16)
    assert torch.equal(model.get_submodule(Q).weight, expected[f"{Q}.weight"].float())
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.float16


def test_the_base_model_without_its_head(saved):
    """Names lose their prefix there."""
    folder, expected, _ = saved()
    model = AutoModel.from_pretrained(folder)
    inner = {name: tensor for name, tensor in expected.items() if name.startswith("model.")}
    assert_same_state(model, {name.removeprefix("model."): t for name, t in inner.items()})


def test_the_loaded_model_is_an_ordinary_one_and_saved_dense(saved, tmp_path):
    """Its weights may be changed, so `save_pretrained` does not pack."""
    folder, expected, modules = saved("unstructured", shard="60KB")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert not hasattr(model, "hf_quantizer")
    assert not model.is_quantized
    model.save_pretrained(tmp_path / "again")
    assert_same_state(stock(tmp_path / "again"), expected)
    config = config_of(tmp_path / "again")
    assert "quantization_config" not in config
    assert config["rac_sparsity"] == {"storage": "dense", "modules": modules}
    pack_checkpoint(tmp_path / "again", modules, [])
    assert_same_state(AutoModelForCausalLM.from_pretrained(tmp_path / "again"), expected)
    model.half().float()
