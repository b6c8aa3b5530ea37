"""Which modules are routed experts, what they read, and what is said of their tokens."""

import pytest
import torch
from llmcompressor.modeling.moe.linearize import linearize_moe
from transformers import AutoModelForCausalLM, GptOssConfig

from rac_modifier import RacError
from rac_modifier.llmcompressor.experts import (
    ExpertTokens,
    check_experts,
    find_experts,
    report_tokens,
)
from tests.tiny import EXPERTS, linears, save_tiny_experts

LAYER = "model.layers.0.mlp.experts"


@pytest.fixture(scope="module", params=["qwen3", "mixtral", "qwen2"])
def model(request, tmp_path_factory):
    folder = save_tiny_experts(tmp_path_factory.mktemp(request.param), request.param)
    return linearize_moe(AutoModelForCausalLM.from_pretrained(folder).eval())


def named(model):
    return {module: name for name, module in linears(model).items()}


def test_every_layer_of_experts_is_found(model):
    names = named(model)
    layers = find_experts(model, names)
    expected = [f"model.layers.{number}.mlp.experts" for number in range(2)]
    assert [layer.name for layer in layers] == expected
    for layer in layers:
        assert [expert.number for expert in layer.experts] == list(range(EXPERTS))
        for expert in layer.experts:
            short = [
                sorted(names[m].removeprefix(f"{expert.name}.") for m in group)
                for group in expert.groups
            ]
            assert short == [["gate_proj", "up_proj"], ["down_proj"]]
        assert len(layer.modules) == 3 * EXPERTS
        assert layer.router is model.get_submodule(layer.name.replace(".experts", ".gate"))


def test_experts_of_unknown_code_are_left_out(model, monkeypatch):
    """What their forward pass is given, or which layer reads what, is not known."""
    kind = type(model.model.layers[0].mlp.experts)
    with monkeypatch.context() as patch:
        patch.setattr(kind, "forward", lambda self, x: x, raising=False)
        assert find_experts(model, named(model)) == []
    expert = model.model.layers[0].mlp.experts[2]
    monkeypatch.setattr(expert, "gated", torch.nn.Linear(2, 2), raising=False)
    left = find_experts(model, named(model))
    assert [layer.name for layer in left] == ["model.layers.1.mlp.experts"]


def test_starved_experts_are_named():
    routed = [400, 30, 100, 0, 250, 9]
    tokens = {f"{LAYER}.{i}": ExpertTokens(n, max(100 - n, 0)) for i, n in enumerate(routed)}
    record = report_tokens(LAYER, tokens, 100)
    assert record["routed"] == {"least": 0, "median": 65.0, "most": 400}
    assert record["starved"] == {
        f"{LAYER}.{i}": {"routed": routed[i], "added": 100 - routed[i]} for i in (1, 3, 5)
    }


@pytest.mark.usefixtures("nothing_is_sampled")
def test_a_floor_without_experts_is_refused(prune):
    with pytest.raises(RacError, match="expert_floor: 64 has no effect here: no routed expert"):
        prune(expert_floor=64)


def test_experts_with_biases_are_refused():
    """llm-compressor saves gpt-oss under names that transformers does not know."""
    sizes = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 32, "head_dim": 16}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    model = AutoModelForCausalLM.from_config(GptOssConfig(**sizes, **heads, **experts))
    check_experts(model)
    linearize_moe(model)
    with pytest.raises(RacError, match=r"layers\.0\.mlp\.experts: experts with biases, as gpt-oss"):
        check_experts(model)
