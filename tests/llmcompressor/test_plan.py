"""Where a model is cut into stages, and which models cannot be."""

import operator

import pytest
import torch
from llmcompressor.modeling.moe.linearize import linearize_moe
from transformers import AutoModelForCausalLM

from rac_modifier.llmcompressor.plan import (
    UntraceableError,
    _refuse_changes_in_place,
    trace_groups,
)
from tests.tiny import linears, save_tiny_experts

GROUPS = [
    ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    ["self_attn.o_proj"],
    ["mlp.gate_proj", "mlp.up_proj"],
    ["mlp.down_proj"],
]
SAMPLE = {"input_ids": torch.arange(2, 34).reshape(2, 16)}


@pytest.fixture
def dense(tiny_folder):
    return AutoModelForCausalLM.from_pretrained(tiny_folder, attn_implementation="eager").eval()


def test_stages_begin_where_modules_read_the_same_tensor(dense):
    names = {module: name for name, module in linears(dense).items()}
    stages = trace_groups(dense, SAMPLE, names, [])
    assert not stages[0].modules
    assert [[names[m] for m in stage.modules] for stage in stages[1:]] == [
        [f"model.layers.{layer}.{name}" for name in group] for layer in range(2) for group in GROUPS
    ]


def test_modules_left_alone_run_inside_the_stages(dense):
    names = {m: n for n, m in linears(dense).items() if "q_proj" in n or "v_proj" in n}
    stages = trace_groups(dense, SAMPLE, names, [])
    assert [[names[m].split(".")[-1] for m in stage.modules] for stage in stages[1:]] == [
        ["q_proj", "v_proj"]
    ] * 2


def test_the_experts_of_a_layer_are_one_stage(tmp_path):
    model = linearize_moe(
        AutoModelForCausalLM.from_pretrained(
            save_tiny_experts(tmp_path, "qwen2"), attn_implementation="eager"
        )
    )
    names = {
        m: n
        for n, m in linears(model.eval()).items()
        if "layers.1." in n and not n.endswith("shared_expert_gate")
    }
    stages = trace_groups(model, SAMPLE, names, [])[1:]
    kinds = [
        (stage.experts.name if stage.experts else None, len(stage.modules)) for stage in stages
    ]
    assert sorted(kinds, key=str) == sorted(
        [(None, 3), (None, 1), (None, 2), (None, 1), ("model.layers.1.mlp.experts", 12)], key=str
    )
    assert [len(group) for stage in stages for group in stage.groups if stage.experts] == [2, 1] * 4
    (stage,) = [stage for stage in stages if stage.experts]
    assert stage.chosen is not None
    assert stage.chosen != stage.reads


def test_a_module_that_is_called_twice_cannot_be_staged(dense):
    dense.model.layers[1].mlp = dense.model.layers[0].mlp
    names = {dense.model.layers[0].mlp.down_proj: "model.layers.0.mlp.down_proj"}
    with pytest.raises(UntraceableError, match=r"down_proj is called 2 times"):
        trace_groups(dense, SAMPLE, names, [])


def test_a_model_whose_code_cannot_be_traced_is_named_as_such(dense):
    def forward(*args, **kwargs):
        raise TypeError("a loop over experts")

    dense.model.layers[0].mlp.forward = forward
    names = {module: name for name, module in linears(dense).items()}
    arange = torch.arange
    with pytest.raises(UntraceableError, match="tracing failed: "):
        trace_groups(dense, SAMPLE, names, [])
    del dense.model.layers[0].mlp.forward
    assert torch.arange is arange
    assert (
        dense.generate(**SAMPLE, max_new_tokens=3, do_sample=False).shape[1] > 16
    )  # with a cache, as before


class Subgraph:
    def __init__(self, graph):
        self.graph = graph


@pytest.mark.parametrize("again", [False, True])
def test_a_tensor_changed_in_place_may_not_be_read_elsewhere(again):
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    made = graph.call_function(torch.zeros_like, (x,))
    graph.call_method("add_", (made, x))
    if again:
        graph.call_function(operator.add, (made, x))
        with pytest.raises(UntraceableError, match=r"in place \(add_\)"):
            _refuse_changes_in_place([Subgraph(graph)])
    else:
        _refuse_changes_in_place([Subgraph(graph)])
