import copy

import pytest
import torch
from transformers import Qwen3ForCausalLM

from rac_modifier.errors import RacError
from rac_modifier.sampling.model_identity import model_fingerprint, tokenizer_fingerprint
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def model(request):
    return tiny_model(tie_word_embeddings=request.param).to(torch.bfloat16)


def test_bfloat16_and_its_upcast_agree(model):
    upcast = copy.deepcopy(model).to(torch.float32)
    assert model_fingerprint(upcast) == model_fingerprint(model)


def test_saving_and_loading_keeps_it(model, tmp_path):
    model.save_pretrained(tmp_path)
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


def test_tokenizer_fingerprint_is_of_the_vocabulary():
    before = tokenizer_fingerprint(tiny_tokenizer())
    assert tokenizer_fingerprint(tiny_tokenizer(chat_template=None)) == before
    grown = tiny_tokenizer()
    grown.add_tokens(["<tool>"])
    assert tokenizer_fingerprint(grown) != before
