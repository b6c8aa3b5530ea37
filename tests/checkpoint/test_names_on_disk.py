"""The names of a saved model's modules, and that separate experts are saved as merged ones are."""

import pytest
import torch
from llmcompressor.modeling.moe.linearize import linearize_moe
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from rac_modifier.checkpoint.names_on_disk import keep_expert_names, names_on_disk
from tests.tiny import linears, save_tiny_experts, tiny_model


def keys(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


@pytest.mark.parametrize("kind", ["mixtral", "qwen3", "qwen2"])
def test_separate_experts_are_saved_under_the_names_of_merged_ones(kind, tmp_path):
    folder = save_tiny_experts(tmp_path / "merged", kind)
    model = AutoModelForCausalLM.from_pretrained(folder)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    linearize_moe(model)
    keep_expert_names(model)
    model.save_pretrained(tmp_path / "separate")
    assert keys(tmp_path / "separate") == keys(folder)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "separate").state_dict()
    assert before.keys() == again.keys()
    assert all(torch.equal(before[name], again[name]) for name in before)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3"])
def test_the_names_are_those_in_the_files(kind, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(save_tiny_experts(tmp_path / "merged", kind))
    linearize_moe(model)
    keep_expert_names(model)
    found = names_on_disk(model, linears(model))
    assert {f"{name}.weight" for name in found.values()} < keys(tmp_path / "merged")
    assert len(set(found.values())) == len(linears(model))
    if kind == "mixtral":
        assert (
            found["model.layers.1.mlp.experts.3.down_proj"]
            == "model.layers.1.block_sparse_moe.experts.3.w2"
        )
    else:
        assert all(name == saved for name, saved in found.items())


def test_models_without_separate_experts_are_left_alone(tmp_path):
    dense = tiny_model()
    merged = AutoModelForCausalLM.from_pretrained(save_tiny_experts(tmp_path, "mixtral"))
    for model in (dense, merged):
        before = getattr(model, "_weight_conversions", None)
        keep_expert_names(model)
        assert getattr(model, "_weight_conversions", None) is before
    assert names_on_disk(dense, ["lm_head", "model.layers.0.mlp.up_proj"]) == {
        "lm_head": "lm_head",
        "model.layers.0.mlp.up_proj": "model.layers.0.mlp.up_proj",
    }
