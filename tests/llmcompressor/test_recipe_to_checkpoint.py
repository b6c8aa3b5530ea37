"""From a recipe to a saved checkpoint, and what is refused when it is saved."""

import json

import pytest
import torch
from llmcompressor import oneshot
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import rac_modifier
from rac_modifier import RacError, ReasoningAwareSparseGPTModifier
from rac_modifier.settings.sampling import PromptSettings
from rac_modifier.traces.store import TraceStore
from tests.llmcompressor.conftest import fp8, int8_head, quantization_config, record_of
from tests.llmcompressor.modifier_helpers import (
    assert_same_weights,
    generic_loader,
    gptq_w4,
    int4,
    weights,
)
from tests.tiny import TOKENS, entry, is_2of4, linears, recipe

IDS = torch.arange(2, 60).unsqueeze(0)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def stored(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


def test_a_recipe_file_is_all_that_oneshot_needs(tiny_folder, trace_store, tmp_path, dense, pruned):
    """And gives the weights that a modifier object gives."""
    (tmp_path / "recipe.yaml").write_text(recipe(entry(trace_store)))
    out = tmp_path / "out"
    path = str(tmp_path / "recipe.yaml")
    model = oneshot(model=str(tiny_folder), recipe=path, output_dir=str(out))
    assert all(is_2of4(m.weight) for m in linears(model).values())
    assert_same_weights(weights(model), weights(pruned.model))
    changed = {n for n, w in weights(model).items() if not torch.equal(w, weights(dense)[n])}
    assert changed == {f"{name}.weight" for name in linears(model)}

    assert "model.layers.0.mlp.down_proj.compressed" in stored(out)
    assert "model.layers.0.mlp.down_proj.weight" not in stored(out)
    loaded = rac_modifier.load_model(out)
    assert_same_weights(weights(loaded), weights(model))
    assert torch.equal(logits(loaded), logits(model))
    assert AutoTokenizer.from_pretrained(out).chat_template
    assert "2:4" in (out / "recipe.yaml").read_text()
    assert (out / "README.md").read_text().startswith("---")


def test_no_written_file_holds_a_path_of_the_machine(pruned, trace_store, tmp_path):
    rac_modifier.load_model(pruned.folder).save_pretrained(tmp_path)
    files = [trace_store, *pruned.folder.iterdir(), *tmp_path.iterdir()]
    written = {path.name for path in files}
    assert {"config.json", "rac_run.json", "recipe.yaml", "README.md"} <= written
    for path in files:
        assert str(tmp_path.parent).encode() not in path.read_bytes(), path.name


UNSTRUCTURED = {"mask_structure": "0:0", "sparsity": 0.5}


@pytest.mark.parametrize(
    ("solver", "pattern"),
    [
        ("wanda", {"mask_structure": "2:4"}),
        ("magnitude", UNSTRUCTURED),
        ("sparsegpt", UNSTRUCTURED),
        ("alps", {"mask_structure": "2:4"}),
    ],
)
def test_every_solver_and_pattern_runs_and_is_packed(prune, tmp_path, dense, solver, pattern):
    model = prune(solver=solver, reconstruct="pruned", output_dir=tmp_path / "out", **pattern)
    for name, module in linears(model).items():
        zeros = float((module.weight == 0).float().mean())
        assert zeros == pytest.approx(0.5, abs=0.02), name
        if solver in ("wanda", "magnitude"):  # kept weights are untouched
            kept = module.weight != 0
            assert torch.equal(module.weight[kept], dense.get_submodule(name).weight[kept])
    expected = "sparse-24-bitmask" if "sparsity" not in pattern else "sparse-bitmask"
    assert quantization_config(tmp_path / "out")["sparsity_config"]["format"] == expected
    assert_same_weights(weights(rac_modifier.load_model(tmp_path / "out")), weights(model))


def test_the_run_record_says_how_the_model_was_made(pruned, tiny_folder, trace_store):
    record, read = pruned.record, TraceStore.read(trace_store)
    assert record["base_model"] == tiny_folder.name
    assert record["mask_structure"] == "2:4"
    assert record["calibration"]["tokens"] == TOKENS
    assert record["calibration"]["trace_tokens"] > TOKENS / 3
    store = record["trace_stores"]["traces"]
    assert (store["path"], store["sha256"]) == (trace_store.name, read.sha256())
    assert record["prompts"]["traces"] == PromptSettings().model_dump()
    assert store["selection"]["kept"] == len(read)
    sequences = record["calibration"]["sequences"]
    parts = {"traces": {"tokens": TOKENS, "sequences": sequences}}
    assert record["calibration"]["parts"] == parts
    assert record["versions"]["llmcompressor"]
    again = ReasoningAwareSparseGPTModifier(**record["modifier"])  # the record can be run again
    assert again.model_dump(mode="json")["calibration"] == record["modifier"]["calibration"]


def test_dense_storage_loads_in_stock_transformers(prune, tmp_path):
    settings = {"solver": "magnitude", "reconstruct": "pruned"}
    model = prune(output_dir=tmp_path / "out", storage="dense", **settings)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_same_weights(weights(loaded), weights(model))
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert record_of(tmp_path / "out")
    model.save_pretrained(tmp_path / "other", save_compressed=False)
    assert "model.layers.0.mlp.down_proj.weight" in stored(tmp_path / "other")


def test_zeros_filled_by_a_later_run_are_refused_at_save_by_name(prune, tmp_path):
    """W4A16 in a run of its own refits what it rounds (upstream #2860)."""
    model = prune(solver="magnitude", reconstruct="pruned")
    oneshot(model=model, recipe=gptq_w4(), dataset=generic_loader(), num_calibration_samples=6)
    with pytest.raises(RacError, match=r"self_attn\.\w+ .*GPTQModifier does.*quantization: {"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_round_to_nearest_fp8_keeps_2of4_and_is_packed(prune, tmp_path):
    model = prune(later=[fp8()], output_dir=tmp_path / "out")
    assert all(is_2of4(m.weight.float()) for m in linears(model).values())
    config = quantization_config(tmp_path / "out")
    assert config["sparsity_config"]["format"] == "sparse-24-bitmask"
    assert config["config_groups"]
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.get_tensor("model.layers.0.mlp.up_proj.compressed").dtype == torch.float8_e4m3fn
    torch.testing.assert_close(logits(rac_modifier.load_model(tmp_path / "out")), logits(model))


def test_a_head_is_quantized_next_to_ours(prune, tmp_path):
    """In codes of its own bits; the layers are those without it."""
    with_head, without = tmp_path / "with", tmp_path / "without"
    prune(quantization=int4(), later=[int8_head()], output_dir=with_head)
    prune(quantization=int4(), output_dir=without)
    groups = quantization_config(with_head)["config_groups"].values()
    bits = {tuple(group["targets"]): group["weights"]["num_bits"] for group in groups}
    assert bits == {("Linear",): 4, ("lm_head",): 8}
    tensors, alone = (load_file(f / "model.safetensors") for f in (with_head, without))
    head = {name: tensors.pop(name) for name in list(tensors) if name.startswith("lm_head")}
    exact = alone.pop("lm_head.weight")
    assert_same_weights(tensors, alone)
    words = head["lm_head.weight_packed"]
    codes = torch.stack([words >> 8 * at & 255 for at in range(4)], -1).flatten(1) - 128
    error = (codes * head["lm_head.weight_scale"] - exact).abs()
    assert 0 < float((error / head["lm_head.weight_scale"]).max()) < 0.51
