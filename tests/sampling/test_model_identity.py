import copy
import json

import pytest
import torch
from llmcompressor.modeling.moe.linearize import linearize_moe
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig

from rac_modifier.errors import RacError
from rac_modifier.sampling import model_identity
from rac_modifier.sampling.model_identity import ModelIdentity, model_fingerprint
from rac_modifier.settings.sampling import SamplingSettings
from tests.tiny import save_tiny_experts, tiny_model


def test_other_weights_or_another_architecture_differ():
    model = tiny_model()
    before = model_fingerprint(model)
    assert model_fingerprint(tiny_model(seed=1)) != before
    pruned = copy.deepcopy(model)
    weight = pruned.model.layers[1].mlp.down_proj.weight.data
    weight[:, 0::4] = 0
    weight[:, 1::4] = 0
    assert model_fingerprint(pruned) != before
    for name, value in {
        "rope_parameters": {"rope_type": "default", "rope_theta": 5.0},
        "hidden_act": "gelu",
        "rms_norm_eps": 1e-3,
        "sliding_window": 7,
        "num_attention_heads": 1,
    }.items():
        other = copy.deepcopy(model)
        setattr(other.config, name, value)
        assert model_fingerprint(other) != before, name

    narrow = copy.deepcopy(model)
    narrow.model.layers[0].mlp.up_proj.weight.data[:, 1:] = 0  # samples spread over the columns
    assert model_fingerprint(narrow) != before


@pytest.mark.parametrize("tool", ["accelerate", "compressed-tensors"])
def test_offloading_keeps_it(tool):
    from accelerate import cpu_offload
    from compressed_tensors.offload.cache.cpu import CPUCache

    model = tiny_model(tie_word_embeddings=True)
    before = model_fingerprint(model)
    if tool == "accelerate":
        cpu_offload(model, execution_device="cpu")
        assert model.model.layers[0].mlp.up_proj.weight.is_meta
    else:
        for module in model.modules():
            if module._parameters:
                module._parameters = CPUCache.from_mapping(module._parameters, "cpu")
    assert model_fingerprint(model) == before


@pytest.mark.parametrize("kind", ["qwen3", "mixtral"])
def test_cutting_experts_into_linear_layers_leaves_the_fingerprint(kind, tmp_path):
    folder = save_tiny_experts(tmp_path, kind)
    before = model_fingerprint(AutoModelForCausalLM.from_pretrained(folder))
    model = linearize_moe(AutoModelForCausalLM.from_pretrained(folder))
    assert model_fingerprint(model) == before
    with torch.no_grad():
        model.model.layers[1].mlp.experts[3].down_proj.weight.mul_(1.5)
    assert model_fingerprint(model) != before


def test_what_has_no_fingerprint_is_refused(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 96}))
    with pytest.raises(RacError, match=r"has the shape .*128.*, not .*96.* as config.json"):
        ModelIdentity.of_files(str(tmp_path))
    with pytest.raises(RacError, match="cannot be read"):
        ModelIdentity.of_files(str(tmp_path / "none"))
    with pytest.raises(RacError, match="meta device"):
        model_fingerprint(tiny_model().to("meta"))


def test_files_that_name_tensors_differently_are_loaded(tmp_path, monkeypatch):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["other.name"] = tensors.pop("model.norm.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(
        model_identity.AutoModelForCausalLM, "from_pretrained", lambda source, **kwargs: model
    )
    assert ModelIdentity.of_files(str(tmp_path)) == ModelIdentity.of_model(model)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("shards", "stored"), [("1GB", torch.float32), ("40KB", torch.bfloat16)])
def test_a_model_on_disk_is_known_as_if_loaded_in_any_precision(tmp_path, tied, shards, stored):
    model = tiny_model(tie_word_embeddings=tied).to(stored)
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.7, eos_token_id=[1, 2])
    model.save_pretrained(tmp_path, max_shard_size=shards)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shards == "40KB")
    on_disk = ModelIdentity.of_files(str(tmp_path))
    assert on_disk.fingerprint == model_fingerprint(model)
    for dtype in (torch.bfloat16, torch.float32):
        loaded = ModelIdentity.of_model(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype))
        for name in ("name", "source", "fingerprint", "vocab_size", "context"):
            assert getattr(on_disk, name) == getattr(loaded, name)
    assert on_disk.source == str(tmp_path)
    assert on_disk.generation_config.eos_token_id == [1, 2]
    assert SamplingSettings().resolved(on_disk.generation_config).temperature == 0.7
