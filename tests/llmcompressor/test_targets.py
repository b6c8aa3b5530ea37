"""Which modules are pruned, and which are left alone."""

import pytest
import torch
from llmcompressor import oneshot

import rac_modifier
from rac_modifier import RacError, ReasoningAwareSparseGPTModifier
from rac_modifier.llmcompressor.targets import find_targets
from rac_modifier.settings.pattern import Pattern
from tests.llmcompressor.modifier_helpers import assert_same_weights, weights
from tests.tiny import entry, is_2of4, linears, save_tiny, tiny_model


def test_targets_and_ignore_are_llm_compressors(prune, dense):
    model = prune(targets="re:.*mlp.*", ignore=["re:.*layers.1.*"])
    pruned = {n for n, m in linears(model).items() if is_2of4(m.weight)}
    assert pruned == {
        f"model.layers.0.mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")
    }


def test_lm_head_is_pruned_only_when_named(prune):
    model = prune(targets=["lm_head", "re:.*q_proj$"])
    assert is_2of4(model.lm_head.weight)
    assert not is_2of4(prune().lm_head.weight)


def test_a_router_gate_is_left_alone():
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config)
    model.model.layers[0].mlp.gate = torch.nn.Linear(
        32, 4, bias=False
    )  # as in models whose router is a Linear
    names = find_targets(model, ["Linear"], [], Pattern.n_of_m(2, 4)).values()
    assert names
    assert not [n for n in names if n.endswith("gate") or n == "lm_head"]


def test_a_tied_head_stays_tied(tmp_path, trace_store):
    folder = save_tiny(tmp_path / "tied", tie_word_embeddings=True)
    modifier = ReasoningAwareSparseGPTModifier(**entry(tmp_path / "store.jsonl"))
    model = oneshot(model=str(folder), recipe=modifier, output_dir=str(tmp_path / "out"))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    loaded = rac_modifier.load_model(tmp_path / "out")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert_same_weights(weights(loaded), weights(model))


@pytest.mark.parametrize(
    ("targets", "says"),
    [
        (
            ["re:.*no_such"],
            "match no linear layer of this Qwen3ForCausalLM; it has, for example, model.layers.0",
        ),
        (["model.norm"], "targets name model.norm, a Qwen3RMSNorm; only Linear layers are pruned"),
    ],
)
def test_targets_that_are_no_linear_layer_are_refused(targets, says):
    with pytest.raises(RacError, match=says):
        find_targets(tiny_model(), targets, [], Pattern.n_of_m(2, 4))


def test_a_tied_head_is_refused():
    with pytest.raises(RacError, match="lm_head shares its weight with the input embedding"):
        find_targets(tiny_model(tie_word_embeddings=True), ["lm_head"], [], Pattern.n_of_m(2, 4))


def test_quantized_weights_are_refused():
    model = tiny_model()
    module = model.model.layers[0].mlp.up_proj
    module.weight = torch.nn.Parameter(module.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(
        RacError, match=r"up_proj has a torch.int8 weight; prune the model before it is quantized"
    ):
        find_targets(model, ["Linear"], [], Pattern.n_of_m(2, 4))
