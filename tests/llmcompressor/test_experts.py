"""Which modules are routed experts, and what they read."""

import pytest
import torch
import torch.nn.functional as F
from llmcompressor.modeling.moe.context import (
    get_calibrate_all_experts_flag,
    moe_calibration_context,
)
from llmcompressor.modeling.moe.linear_experts import LinearExperts2D
from llmcompressor.modeling.moe.linearize import linearize_moe
from transformers import AutoModelForCausalLM

from rac_modifier.llmcompressor.experts import find_experts, only_routed_tokens
from tests.tiny import EXPERTS, linears, save_tiny_experts, tiny_model


@pytest.fixture(scope="module", params=["qwen3", "mixtral", "qwen2"])
def model(request, tmp_path_factory):
    folder = save_tiny_experts(tmp_path_factory.mktemp(request.param), request.param)
    return linearize_moe(AutoModelForCausalLM.from_pretrained(folder).eval())


def named(model):
    return {module: name for name, module in linears(model).items()}


def test_every_layer_of_experts_is_found(model):
    found = find_experts(model, named(model))
    assert [routed.name for routed in found] == [
        f"model.layers.{layer}.mlp.experts" for layer in range(2)
    ]
    names = named(model)
    for routed in found:
        assert [expert.number for expert in routed.experts] == list(range(EXPERTS))
        for expert in routed.experts:
            parts = [
                sorted(names[m].removeprefix(f"{expert.name}.") for m in group)
                for group in expert.groups
            ]
            assert parts == [["gate_proj", "up_proj"], ["down_proj"]]
        assert len(routed.modules) == 3 * EXPERTS
        assert routed.router is model.get_submodule(routed.name.replace(".experts", ".gate"))


def test_only_what_is_pruned_counts(model):
    names = {
        m: n
        for m, n in named(model).items()
        if "layers.1" in n and (".experts.1.up" in n or ".experts.3.down" in n)
    }
    (routed,) = find_experts(model, names)
    assert [
        (expert.number, [len(group) for group in expert.groups]) for expert in routed.experts
    ] == [
        (1, [1]),
        (3, [1]),
    ]
    assert find_experts(model, {}) == []


def test_a_dense_model_has_none():
    model = tiny_model()
    assert find_experts(model, named(model)) == []


def test_experts_of_unknown_code_are_left_out(model, monkeypatch):
    """What their forward pass is given, or which layer reads what, is not known."""
    one = type(model.model.layers[0].mlp.experts)
    monkeypatch.setattr(one, "forward", lambda self, x: x, raising=False)
    assert find_experts(model, named(model)) == []
    monkeypatch.undo()
    monkeypatch.setattr(
        model.model.layers[0].mlp.experts[2], "gated", torch.nn.Linear(2, 2), raising=False
    )
    assert [routed.name for routed in find_experts(model, named(model))] == [
        "model.layers.1.mlp.experts"
    ]


def test_what_down_reads(model):
    expert = find_experts(model, named(model))[0].experts[2]
    x = torch.randn(5, 64)
    with torch.no_grad():
        read = expert.read_by_last(x)
        gate, up = (
            F.linear(x, getattr(expert.module, part).weight) for part in ("gate_proj", "up_proj")
        )
        torch.testing.assert_close(read, F.silu(gate) * up)
        assert expert.module(x).shape == (5, 64), "the hook is gone"


def test_each_expert_runs_on_its_own_tokens_only(model):
    """Whatever upstream's switch says; it is as before at the end."""
    experts = model.model.layers[0].mlp.experts
    assert isinstance(experts, LinearExperts2D)
    seen = []
    hook = experts[0].register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    chosen = torch.tensor([[0, 1], [2, 3], [1, 0], [3, 1]])
    with torch.no_grad(), moe_calibration_context():
        every = experts(torch.ones(4, 64), chosen, torch.ones(4, 2))
        with only_routed_tokens():
            routed = experts(torch.ones(4, 64), chosen, torch.ones(4, 2))
        assert get_calibrate_all_experts_flag()
    hook.remove()
    assert seen == [4, 2]
    torch.testing.assert_close(every, routed)
