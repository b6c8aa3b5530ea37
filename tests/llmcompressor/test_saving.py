import json

import pytest
import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

import rac_modifier
from rac_modifier import RacError
from tests.llmcompressor.modifier_helpers import (
    assert_same_weights,
    generic_loader,
    gptq_w4,
    weights,
)
from tests.tiny import is_2of4, linears


def test_dense_storage_loads_in_stock_transformers(prune, tmp_path):
    model = prune(output_dir=tmp_path / "out", storage="dense")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_same_weights(weights(loaded), weights(model))
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert (tmp_path / "out" / "rac_run.json").exists()


def test_save_compressed_false_stores_dense(prune, tmp_path):
    prune(output_dir=tmp_path / "out", oneshot_options={"save_compressed": False})
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert "model.layers.0.mlp.down_proj.weight" in file.keys()  # noqa: SIM118 - not a dict


def test_a_sharded_save_is_packed_too(prune, tmp_path):
    model = prune()
    model.save_pretrained(tmp_path / "out", max_shard_size="100KB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    assert_same_weights(weights(rac_modifier.load_model(tmp_path / "out")), weights(model))


def test_saving_to_a_folder_that_holds_a_checkpoint_goes_beside_it(prune, tmp_path):
    """`save_pretrained` after the run; `oneshot` refuses such an output_dir before it."""
    prune(output_dir=tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    model = prune(calibration={"tokens": 400})
    model.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    beside = tmp_path / "out-1"
    assert_same_weights(weights(rac_modifier.load_model(beside)), weights(model))
    assert AutoTokenizer.from_pretrained(beside).chat_template
    model.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out-2" / "model.safetensors").exists()


def test_zeros_filled_after_pruning_are_refused_at_save_by_name(prune, tmp_path):
    model = prune()
    model.model.layers[1].mlp.up_proj.weight.data[0, :4] = 1.0
    with pytest.raises(
        RacError, match=r"model\.layers\.1\.mlp\.up_proj .*no longer holds.*Nothing was written"
    ):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_gptq_filled_in_a_run_of_its_own_is_refused_at_save_by_name(prune, tmp_path):
    """W4A16 refits what it quantises and fills zeros (upstream issue 2860)."""
    model = prune()
    oneshot(model=model, recipe=gptq_w4(), dataset=generic_loader(), num_calibration_samples=6)
    with pytest.raises(
        RacError,
        match=r"model\.layers\.0\.self_attn\.\w+ .*GPTQModifier does.*quantization: {scheme",
    ):
        model.save_pretrained(tmp_path / "o")
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("pipeline", ["independent", "sequential"])
def test_round_to_nearest_fp8_keeps_2of4_and_is_packed(prune, tmp_path, pipeline):
    later = QuantizationModifier(targets=["Linear"], ignore=["lm_head"], scheme="FP8_DYNAMIC")
    model = prune(later=[later], output_dir=tmp_path / "out", pipeline=pipeline)
    assert all(is_2of4(m.weight.float()) for m in linears(model).values())
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["sparsity_config"]["format"] == "sparse-24-bitmask"
    assert config["config_groups"]
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.get_tensor("model.layers.0.mlp.up_proj.compressed").dtype == torch.float8_e4m3fn
    loaded = rac_modifier.load_model(tmp_path / "out")
    ids = torch.arange(2, 60).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
