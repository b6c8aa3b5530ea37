"""Saving a compressed transformers model: what is checked, packed and recorded."""

import json

import pytest
import torch
from llmcompressor.modeling.moe.linearize import linearize_moe
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel

from rac_modifier.checkpoint.hf_quantizer import load_model
from rac_modifier.checkpoint.output_folder import STAGING
from rac_modifier.checkpoint.saving import (
    SavePlan,
    keep_expert_names,
    names_on_disk,
    save_with_record,
)
from rac_modifier.errors import RacError
from rac_modifier.settings.pattern import Pattern
from tests.checkpoint.checkpoint_helpers import (
    PRUNERS,
    assert_same_state,
    config_of,
    contents,
    tiny_model,
)
from tests.tiny import linears, save_tiny_experts

PATTERNS = {"2:4": Pattern.n_of_m(2, 4), "unstructured": Pattern.unstructured(0.45)}


def pruned(structure: str = "2:4", **plan: object) -> PreTrainedModel:
    """A model whose `save_pretrained` is ours."""
    model = tiny_model()
    modules = linears(model)
    for linear in modules.values():
        PRUNERS[structure](linear.weight.data)
    patterns = dict.fromkeys(modules, PATTERNS[structure])
    values = {"record": {"method": "alps", "seed": 3}, "patterns": patterns, "modules": modules}
    made = SavePlan(**{**values, **plan})
    save_with_record(model, lambda: made)
    return model


@pytest.mark.parametrize("structure", PATTERNS)
def test_packed_with_record_and_card(tmp_path, structure):
    model = pruned(structure)
    model.config._name_or_path = "owner/base"
    model.save_pretrained(tmp_path / "out")
    config = config_of(tmp_path / "out")
    assert config["quantization_config"]["sparsity_config"]["format"].startswith("sparse-")
    assert config["quantization_config"]["sparsity_config"]["ignore"] == ["lm_head"]
    assert set(config["rac_sparsity"]["modules"].values()) == {structure}
    record = json.loads((tmp_path / "out" / "rac_run.json").read_text())
    assert (record["base_model"], record["method"], record["seed"]) == ("owner/base", "alps", 3)
    assert record["versions"]["torch"] == torch.__version__
    assert "| Solver | alps |" in (tmp_path / "out" / "README.md").read_text()
    assert_same_state(load_model(tmp_path / "out"), model.state_dict())


@pytest.mark.parametrize("plan", [{"storage": "dense"}, {}])
def test_stored_dense_and_marked(tmp_path, plan):
    options = {} if plan else {"save_compressed": False}
    pruned(**plan).save_pretrained(tmp_path / "out", **options)
    config = config_of(tmp_path / "out")
    assert "quantization_config" not in config
    assert config["rac_sparsity"]["storage"] == "dense"


@pytest.mark.parametrize("compressed", [True, False])
def test_layers_with_8_bit_activations_are_recorded_where_codes_are_saved(tmp_path, compressed):
    first, second, *_ = linears(tiny_model())
    rows = {first: {"bits": 8}, second: {"bits": 16}}
    entry = {"limit": 0.1, "layers": rows}
    pruned(activations=entry).save_pretrained(tmp_path / "out", save_compressed=compressed)
    chosen = config_of(tmp_path / "out")["rac_sparsity"].get("int8_activations", [])
    assert chosen == ([first] if compressed else [])
    record = json.loads((tmp_path / "out" / "rac_run.json").read_text())
    assert record.get("activations") == (entry if compressed else None)


def test_what_is_not_pruned_is_recorded_without_the_activations_of_the_model_before(tmp_path):
    """They were measured with other weights. The vLLM plugin knows our checkpoints by the entry."""
    model = pruned(patterns={}, modules={})
    before = {"storage": "dense", "modules": {}, "int8_activations": ["model.layers.0.mlp.up_proj"]}
    model.config.rac_sparsity = before
    model.save_pretrained(tmp_path / "out")
    assert config_of(tmp_path / "out")["rac_sparsity"] == {"storage": "dense", "modules": {}}
    assert (tmp_path / "out" / "rac_run.json").exists()


@pytest.mark.parametrize("structure", PATTERNS)
def test_zeros_that_are_gone_are_refused_before_anything_is_written(tmp_path, structure):
    model = pruned(structure)
    model.model.layers[1].mlp.up_proj.weight.data.fill_(1.0)
    with pytest.raises(
        RacError,
        match=r"^model\.layers\.1\.mlp\.up_proj \(1 modules in all\) no longer holds .* Nothing "
        r"was",
    ):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_with_weights_is_left_as_it_is(tmp_path):
    model = pruned()
    model.save_pretrained(tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(RacError, match=r"out: holds a checkpoint, .* name another folder"):
        model.save_pretrained(tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_wrapped_twice_it_saves_once_with_the_last_plan(tmp_path):
    model = pruned()
    save_with_record(model, lambda: SavePlan({"method": "wanda"}))
    model.save_pretrained(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "rac_run.json").read_text())["method"] == "wanda"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_no_file_holds_an_absolute_path(tmp_path):
    """The recipe is upstream's copy, which is written with the weights."""
    private = tmp_path / "private"
    record = {
        "trace_stores": {"traces": {"path": str(private / "t.jsonl")}},
        "note": f"from {private / 't.jsonl'}",
    }
    recipe = (
        f"stage:\n  store: {private / 't.jsonl'}  # mine\n  kind: !!python/object/apply:some.Enum "
        "[int]\n"
    )

    def prepare(model: PreTrainedModel, compressed: bool) -> None:
        (tmp_path / "out" / STAGING).mkdir(parents=True)
        (tmp_path / "out" / STAGING / "recipe.yaml").write_text(recipe)

    model = pruned(record=record, prepare=prepare)
    model.config._name_or_path = str(private / "Base-1B")
    model.save_pretrained(tmp_path / "out")
    for name, content in contents(tmp_path / "out").items():
        assert str(tmp_path).encode() not in content, name
    written = json.loads((tmp_path / "out" / "rac_run.json").read_text())
    assert written["base_model"] == "Base-1B"
    assert written["note"] == "from t.jsonl"
    shown = recipe.replace(str(private / "t.jsonl"), "t.jsonl")
    assert (tmp_path / "out" / "recipe.yaml").read_text() == shown
    assert "# Base-1B compressed" in (tmp_path / "out" / "README.md").read_text()


def test_a_record_that_is_no_json_never_costs_the_weights(tmp_path, monkeypatch):
    """A loss of NaN after hours of training; and a card that cannot be made."""
    record = {"loss": float("nan"), "losses": (1.5, float("inf")), "device": torch.device("cpu")}
    pruned(record=record).save_pretrained(tmp_path / "a")
    written = json.loads((tmp_path / "a" / "rac_run.json").read_text())
    values = [written[name] for name in ("loss", "losses", "device")]
    assert values == ["NaN", [1.5, "Infinity"], "cpu"]
    monkeypatch.setattr("rac_modifier.checkpoint.card.model_card", lambda *_: 1 / 0)
    model = pruned()
    model.save_pretrained(tmp_path / "b")
    assert_same_state(load_model(tmp_path / "b"), model.state_dict())


def keys(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


@pytest.mark.parametrize("kind", ["mixtral", "qwen3"])
def test_the_names_are_those_in_the_files(kind, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(save_tiny_experts(tmp_path / "merged", kind))
    linearize_moe(model)
    keep_expert_names(model)
    actual = names_on_disk(model, linears(model))
    assert {f"{name}.weight" for name in actual.values()} < keys(tmp_path / "merged")
    assert len(set(actual.values())) == len(linears(model))
    if kind == "mixtral":
        assert (
            actual["model.layers.1.mlp.experts.3.down_proj"]
            == "model.layers.1.block_sparse_moe.experts.3.w2"
        )
    else:
        assert all(name == saved for name, saved in actual.items())


def test_an_upload_is_refused_with_the_next_step_once_the_model_is_saved(tmp_path):
    """Upstream would upload the weights before they are packed."""
    model = pruned()
    with pytest.raises(RacError, match=r"out: saved, and not uploaded; hf upload OWNER/NAME"):
        model.save_pretrained(tmp_path / "out", push_to_hub=True)
    assert_same_state(load_model(tmp_path / "out"), model.state_dict())


def test_sampling_defaults_that_transformers_would_not_save_are_saved_as_they_were(tmp_path):
    """Models of the hub have a temperature without do_sample, or a pad token of -1."""
    model = pruned()
    model.generation_config.temperature, model.generation_config.pad_token_id = 0.9, -1
    with pytest.raises(ValueError, match="do_sample"):
        model.generation_config.validate(strict=True)
    model.save_pretrained(tmp_path / "out")
    saved = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert (saved["temperature"], saved["pad_token_id"]) == (0.9, -1)
    with pytest.raises(ValueError, match="do_sample"):
        model.generation_config.validate(strict=True)
