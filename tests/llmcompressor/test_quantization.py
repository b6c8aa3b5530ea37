"""Pruning and quantization in one pass, from the recipe to the loaded checkpoint."""

import json

import pytest
import torch
import yaml
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from transformers import AutoModelForCausalLM

import rac_modifier
from rac_modifier import ReasoningAwareSparseGPTModifier, cli
from rac_modifier.checkpoint.inspect import inspect_checkpoint
from tests.checkpoint.checkpoint_helpers import dense_tensors
from tests.llmcompressor.modifier_helpers import assert_same_weights, gptq_w4, int4, weights
from tests.tiny import calibration_entry, is_2of4, linears, recipe

INT8 = {"config_groups": {"w": {"weights": {"num_bits": 8, "strategy": "channel"}}}}
SCHEMES = {
    "int4": int4(),
    "int8": INT8,
    "w8a8": {"scheme": "W8A8"},
    "fp8": {"scheme": "FP8_DYNAMIC"},
}
FORMATS = {
    "int4": "pack-quantized",
    "int8": "pack-quantized",
    "w8a8": "int-quantized",
    "fp8": "float-quantized",
}
COMPRESSED = {
    "int4": torch.int32,
    "int8": torch.int8,
    "w8a8": torch.int8,
    "fp8": torch.float8_e4m3fn,
}
PATTERNS = {
    "2:4": {"mask_structure": "2:4"},
    "unstructured": {"mask_structure": "0:0", "sparsity": 0.5},
}
IDS = torch.arange(2, 60).unsqueeze(0)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_one_entry_prunes_and_quantizes_and_the_checkpoint_gives_the_same_model(
    prune, tmp_path, scheme, pattern
):
    out = tmp_path / "out"
    model = prune(output_dir=out, quantization=SCHEMES[scheme], **PATTERNS[pattern])

    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["format"] == FORMATS[scheme]
    assert config["ignore"] == ["lm_head"]
    assert config["sparsity_config"]["format"] == {"2:4": "sparse-24-bitmask"}.get(
        pattern, "sparse-bitmask"
    )
    report = inspect_checkpoint(out)
    assert report.sound
    assert len(report.sparse) == 14
    for row in report.sparse:
        assert row.sparsity >= 0.49
        assert row.pattern_ok is (True if pattern == "2:4" else None)
    assert len(report.quantization) == 1
    assert report.quantization[0].format == FORMATS[scheme]

    loaded = rac_modifier.load_model(out)
    assert_same_weights(weights(loaded), weights(model))  # after saving both are compressed
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=0)
    for module in linears(loaded).values():  # the forward pass above decompressed it
        assert float((module.weight == 0).float().mean()) >= 0.49
        assert pattern != "2:4" or is_2of4(module.weight.float())

    assert not any("zero_point" in name for name in dense_tensors(out))
    record = json.loads((out / "rac_run.json").read_text())
    assert len(record["quantization"]) == 1
    for module in record["modules"]:
        before, after = module["relative_error_before_rounding"], module["relative_error"]
        # eight bits cost next to nothing, and the sweeps go on where the refit ended
        assert (
            0 < after == pytest.approx(before, rel=0.01)
            if "8" in scheme and scheme != "fp8"
            else before < after < 1
        )
        assert module["quantization"]
    assert "pruned and quantized" in (out / "README.md").read_text()
    ReasoningAwareSparseGPTModifier(**record["modifier"])  # the record can be run again


@pytest.mark.parametrize("scheme", SCHEMES)
def test_in_bfloat16_no_weight_is_rounded_anew_when_it_is_saved(
    prune, tmp_path, scheme, off_policy
):
    """Codes are read back from the stored tensors, and compared with the weights that the pass left."""
    model = prune(
        quantization=SCHEMES[scheme], oneshot_options={"precision": "bfloat16"}, traces=off_policy
    )
    before = {name: module.weight.detach().clone() for name, module in linears(model).items()}
    scales = {name: module.weight_scale.detach().clone() for name, module in linears(model).items()}
    model.save_pretrained(tmp_path / "out")
    loaded = rac_modifier.load_model(tmp_path / "out", dtype=torch.bfloat16)
    logits(loaded)  # decompresses
    for name, module in linears(loaded).items():
        assert torch.equal(module.weight_scale, scales[name])
        assert torch.equal(module.weight, before[name]), name


@pytest.mark.parametrize("scheme", ["int4", "fp8"])
def test_dense_storage_of_sparse_and_quantized_loads_in_stock_transformers(prune, tmp_path, scheme):
    model = prune(output_dir=tmp_path / "out", storage="dense", quantization=SCHEMES[scheme])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_same_weights(weights(loaded), weights(model))
    assert inspect_checkpoint(tmp_path / "out").sound
    assert all(row.pattern_ok for row in inspect_checkpoint(tmp_path / "out").sparse)


def test_a_model_that_is_saved_twice_is_the_same_twice(prune, tmp_path):
    model = prune(quantization=SCHEMES["int4"])
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "two")
    first, second = (dense_tensors(tmp_path / name) for name in ("one", "two"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_shards_that_part_a_modules_tensors_are_packed_too(prune, tmp_path):
    model = prune(quantization=SCHEMES["int4"])
    model.save_pretrained(tmp_path / "out", max_shard_size="5KB")
    assert_same_weights(weights(rac_modifier.load_model(tmp_path / "out")), weights(model))


def test_a_sparse_model_is_quantized_as_it_is(prune, tmp_path, off_policy):
    """In two steps: pruned and saved, loaded and quantized."""
    prune(output_dir=tmp_path / "sparse")
    sparse = rac_modifier.load_model(tmp_path / "sparse")
    zeros = {name: module.weight == 0 for name, module in linears(sparse).items()}
    settings = {"solver": "keep", "quantization": SCHEMES["int4"], "traces": off_policy}
    model = prune(model=sparse, output_dir=tmp_path / "out", **settings)
    logits(model)
    for name, module in linears(model).items():
        assert not module.weight[zeros[name]].any()
        assert module.weight[~zeros[name]].any()
    assert inspect_checkpoint(tmp_path / "out").sound


def test_the_command_line_quantizes_a_packed_model(prune, tmp_path, off_policy):
    prune(output_dir=tmp_path / "sparse")
    settings = {
        "mask_structure": "2:4",
        "solver": "keep",
        "quantization": int4(),
        "traces": off_policy,
    }
    (tmp_path / "r.yaml").write_text(recipe({**settings, "calibration": {"tokens": 400}}))
    command = ["prune", tmp_path / "sparse", tmp_path / "out", "-r", tmp_path / "r.yaml"]
    cli.app([str(part) for part in command], standalone_mode=False)
    report = inspect_checkpoint(tmp_path / "out")
    assert report.sound
    assert {row.dtype for row in report.sparse} == {"I4"}


def test_keep_without_quantization_leaves_the_weights_that_fit_already(prune, off_policy):
    sparse = prune(reconstruct="pruned")
    before = weights(sparse)
    again = prune(model=sparse, solver="keep", reconstruct="pruned", traces=off_policy)
    for name, value in weights(again).items():
        torch.testing.assert_close(value, before[name], rtol=1e-4, atol=1e-5)


def test_only_what_the_schemes_target_is_quantized(prune, tmp_path):
    group = {"targets": ["re:.*mlp.*"], "weights": {"num_bits": 8, "strategy": "channel"}}
    model = prune(quantization={"config_groups": {"mlp": group}}, output_dir=tmp_path / "out")
    quantized = {name for name, module in model.named_modules() if hasattr(module, "weight_scale")}
    assert quantized == {name for name in linears(model) if ".mlp." in name}
    assert is_2of4(model.model.layers[0].self_attn.q_proj.weight)
    assert_same_weights(weights(rac_modifier.load_model(tmp_path / "out")), weights(model))
    assert inspect_checkpoint(tmp_path / "out").sound


def test_the_papers_layer_order_quantizes_too(prune):
    model = prune(preset="paper", quantization=SCHEMES["int4"])
    for module in linears(model).values():
        assert is_2of4(module.weight)
        on_grid = fake_quantize(
            module.weight, module.weight_scale, None, module.quantization_scheme.weights
        )
        torch.testing.assert_close(module.weight, on_grid)


@pytest.mark.parametrize("pipeline", ["independent", "sequential"])
def test_quantization_alone_takes_the_traces(calibrate, tmp_path, pipeline, tiny_folder):
    model = calibrate(later=[gptq_w4()], output_dir=tmp_path / "out", pipeline=pipeline)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")  # an ordinary checkpoint
    assert_same_weights(weights(loaded), weights(model))
    record = json.loads((tmp_path / "out" / "rac_run.json").read_text())
    assert record["base_model"] == tiny_folder.name
    assert record["method"] == "GPTQModifier"
    assert record["calibration"]["trace_tokens"] > 0
    assert record["quantization"] == ["int4 in groups of 32 (pack-quantized)"]
    assert "pattern" not in record
    card = (tmp_path / "out" / "README.md").read_text()
    assert "quantized" in card
    assert "pruned" not in card
    assert inspect_checkpoint(tmp_path / "out").sound


def test_a_recipe_of_quantization_alone_takes_the_command_line_and_traces(
    tiny_folder, trace_store, tmp_path
):
    shared = calibration_entry(trace_store)
    modifiers = {
        "ReasoningAwareCalibrationModifier": shared,
        "GPTQModifier": {"ignore": ["lm_head"], **int4()},
    }
    (tmp_path / "r.yaml").write_text(
        yaml.safe_dump({"q_stage": {"q_modifiers": modifiers}}, sort_keys=False)
    )
    command = [
        "prune",
        tiny_folder,
        tmp_path / "out",
        "-r",
        tmp_path / "r.yaml",
        "-s",
        "calibration.tokens=400",
    ]
    cli.app([str(part) for part in command], standalone_mode=False)
    record = json.loads((tmp_path / "out" / "rac_run.json").read_text())
    assert record["calibration"]["tokens"] == 400
