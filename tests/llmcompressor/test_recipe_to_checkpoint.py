import json

import pytest
import torch
from llmcompressor import oneshot
from safetensors import safe_open
from transformers import AutoTokenizer

import rac_modifier
from rac_modifier import ReasoningAwareSparseGPTModifier
from rac_modifier.traces.store import TraceStore
from tests.llmcompressor.modifier_helpers import assert_same_weights, weights
from tests.tiny import TOKENS, entry, is_2of4, linears, recipe


def test_a_recipe_file_is_all_that_oneshot_needs(tiny_folder, trace_store, tmp_path, dense):
    (tmp_path / "recipe.yaml").write_text(recipe(entry(trace_store)))
    out = tmp_path / "out"
    model = oneshot(
        model=str(tiny_folder), recipe=str(tmp_path / "recipe.yaml"), output_dir=str(out)
    )
    assert all(is_2of4(m.weight) for m in linears(model).values())
    changed = {n for n in weights(model) if not torch.equal(weights(model)[n], weights(dense)[n])}
    assert changed == {
        f"{name}.weight" for name in linears(model)
    }  # lm_head, embeddings and norms are untouched

    with safe_open(out / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert "model.layers.0.mlp.down_proj.compressed" in names
    assert "model.layers.0.mlp.down_proj.weight" not in names
    loaded = rac_modifier.load_model(out)
    assert_same_weights(weights(loaded), weights(model))
    ids = torch.arange(2, 60).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
    assert AutoTokenizer.from_pretrained(out).chat_template
    assert "2:4" in (out / "recipe.yaml").read_text()
    assert (out / "README.md").read_text().startswith("---")


def test_a_modifier_object_gives_the_same_weights_as_a_file(tiny_folder, trace_store, prune):
    by_text = oneshot(model=str(tiny_folder), recipe=recipe(entry(trace_store)))
    assert_same_weights(weights(by_text), weights(prune()))


def test_the_traces_are_sampled_where_there_are_none(
    tiny_folder, tmp_path, monkeypatch, prune, trace_store
):
    monkeypatch.chdir(tmp_path)
    model = oneshot(model=str(tiny_folder), recipe=recipe(entry(None)))
    (store,) = (tmp_path / "rac_traces").glob("*.jsonl")
    assert TraceStore.read(store).counts.tokens >= TOKENS
    assert all(is_2of4(m.weight) for m in linears(model).values())


@pytest.mark.parametrize("solver", ["wanda", "magnitude", "sparsegpt", "alps"])
@pytest.mark.parametrize(
    "pattern", [{"mask_structure": "2:4"}, {"mask_structure": "0:0", "sparsity": 0.5}]
)
def test_every_solver_and_pattern_runs_and_is_packed(prune, tmp_path, dense, solver, pattern):
    model = prune(solver=solver, reconstruct="pruned", output_dir=tmp_path / "out", **pattern)
    for name, module in linears(model).items():
        zeros = float((module.weight == 0).float().mean())
        assert zeros == pytest.approx(0.5, abs=0.02), name
        if solver in ("wanda", "magnitude"):  # kept weights are untouched
            kept = module.weight != 0
            assert torch.equal(module.weight[kept], dense.get_submodule(name).weight[kept])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    expected = "sparse-24-bitmask" if "sparsity" not in pattern else "sparse-bitmask"
    assert config["quantization_config"]["sparsity_config"]["format"] == expected
    assert_same_weights(weights(rac_modifier.load_model(tmp_path / "out")), weights(model))


def test_the_run_record_says_what_was_done(prune, tmp_path, tiny_folder, trace_store):
    prune(output_dir=tmp_path / "out")
    record = json.loads((tmp_path / "out" / "rac_run.json").read_text())
    assert record["base_model"] == tiny_folder.name
    assert record["method"] == "alps"
    assert record["order"] == {"order": "group", "why": "order: auto", "reconstruct": "dense"}
    assert record["mask_structure"] == "2:4"
    assert record["calibration"]["tokens"] == TOKENS
    assert record["calibration"]["trace_tokens"] > TOKENS / 3
    store = record["trace_stores"]["traces"]
    assert (store["path"], store["sha256"]) == (
        trace_store.name,
        TraceStore.read(trace_store).sha256(),
    )
    assert store["prompt"]["add_generation_prompt"] is store["prompt"]["enable_thinking"] is True
    assert store["selection"]["kept"] == len(TraceStore.read(trace_store))
    assert record["calibration"]["parts"] == {
        "traces": {"tokens": TOKENS, "sequences": record["calibration"]["sequences"]}
    }
    assert record["versions"]["llmcompressor"]
    assert len(record["modules"]) == 14
    for module in record["modules"]:
        assert module["tokens"] == TOKENS
        assert module["sparsity"] == pytest.approx(0.5, abs=0.01)
        assert 0 < module["relative_error"] < 1
    again = ReasoningAwareSparseGPTModifier(**record["modifier"])  # the record can be run again
    assert again.model_dump(mode="json")["calibration"] == record["modifier"]["calibration"]
