import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig, Qwen3ForCausalLM

from rac_modifier.errors import RacError
from rac_modifier.sampling import model_identity
from rac_modifier.sampling.model_identity import (
    ModelIdentity,
    model_fingerprint,
)
from rac_modifier.settings.sampling import SamplingSettings
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def model(request):
    return tiny_model(tie_word_embeddings=request.param)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_the_dtype_of_loading_leaves_it(model, tmp_path, stored):
    model.to(stored).save_pretrained(tmp_path)
    assert ModelIdentity.of_files(str(tmp_path)).fingerprint == model_fingerprint(model)
    for dtype in (torch.bfloat16, torch.float32):
        loaded = Qwen3ForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        assert model_fingerprint(loaded) == model_fingerprint(model)


def test_other_weights_or_another_architecture_differ(model):
    before = model_fingerprint(model)
    assert model_fingerprint(tiny_model(seed=1)) != before
    pruned = copy.deepcopy(model)
    weight = pruned.model.layers[1].mlp.down_proj.weight.data
    weight[:, 0::4] = 0
    weight[:, 1::4] = 0
    assert model_fingerprint(pruned) != before
    stretched = copy.deepcopy(model)
    stretched.config.rope_parameters = {"rope_type": "default", "rope_theta": 5.0}
    assert model_fingerprint(stretched) != before


def test_samples_spread_over_the_columns():
    """A stride that divides the row length would read one column only, and miss a change in all the others."""
    model = tiny_model()
    before = model_fingerprint(model)
    model.model.layers[0].mlp.up_proj.weight.data[:, 1:] = 0
    assert model_fingerprint(model) != before


def test_offloading_with_accelerate_keeps_it(model):
    from accelerate import cpu_offload

    before = model_fingerprint(model)
    cpu_offload(model, execution_device="cpu")
    assert model.model.layers[0].mlp.up_proj.weight.is_meta
    assert model_fingerprint(model) == before


def test_offloading_with_compressed_tensors_keeps_it(model):
    from compressed_tensors.offload.cache.cpu import CPUCache

    before = model_fingerprint(model)
    for module in model.modules():
        if module._parameters:
            module._parameters = CPUCache.from_mapping(module._parameters, "cpu")
    assert model_fingerprint(model) == before


def test_a_model_without_weights_is_refused(model):
    with pytest.raises(RacError, match="meta device"):
        model_fingerprint(model.to("meta"))


def test_weights_of_another_shape_than_the_config_are_refused(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 96}))
    with pytest.raises(RacError, match=r"has the shape .*128.*, not .*96.* as config.json"):
        ModelIdentity.of_files(str(tmp_path))


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
@pytest.mark.parametrize("shards", ["1GB", "40KB"])
def test_a_model_on_disk_is_known_as_if_loaded(tmp_path, tied, shards):
    model = tiny_model(tie_word_embeddings=tied).to(torch.bfloat16)
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.7, eos_token_id=[1, 2])
    model.save_pretrained(tmp_path, max_shard_size=shards)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shards == "40KB")
    loaded = ModelIdentity.of_model(
        AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    )
    found = ModelIdentity.of_files(str(tmp_path))
    assert (found.name, found.fingerprint) == (loaded.name, loaded.fingerprint)
    assert found.source == loaded.source == str(tmp_path)
    assert (found.vocab_size, found.context) == (loaded.vocab_size, loaded.context)
    assert found.eos(tiny_tokenizer()) == (1, 2)
    assert SamplingSettings().resolved(found.generation_config) == SamplingSettings().resolved(
        loaded.generation_config
    )


def test_a_model_that_is_not_there(tmp_path):
    with pytest.raises(RacError, match="cannot be read"):
        ModelIdentity.of_files(str(tmp_path / "none"))
