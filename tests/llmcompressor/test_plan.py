"""Where a model is cut into stages, and which models cannot be."""

import operator
from types import SimpleNamespace

import pytest
import torch
from llmcompressor.modeling.moe.context import moe_calibration_context
from llmcompressor.modeling.moe.linearize import linearize_moe
from llmcompressor.pipelines.cache import IntermediatesCache
from llmcompressor.pipelines.sequential.helpers import trace_subgraphs
from llmcompressor.utils.helpers import calibration_forward_context
from transformers import AutoModelForCausalLM

from rac_modifier.llmcompressor.plan import (
    Stage,
    UntraceableError,
    _refuse_changes_in_place,
    trace_groups,
    use_own_configs,
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


def mixture(folder, kind):
    saved = save_tiny_experts(folder, kind)
    model = AutoModelForCausalLM.from_pretrained(saved, attn_implementation="eager")
    return linearize_moe(model.eval())


def test_stages_begin_where_modules_read_the_same_tensor(dense):
    names = {module: name for name, module in linears(dense).items()}
    stages = trace_groups(dense, SAMPLE, names, [])
    assert not stages[0].modules
    assert [[names[m] for m in stage.modules] for stage in stages[1:]] == [
        [f"model.layers.{layer}.{name}" for name in group] for layer in range(2) for group in GROUPS
    ]


def test_the_experts_of_a_layer_are_one_stage(tmp_path):
    model = mixture(tmp_path, "qwen2")
    names = {m: n for n, m in linears(model).items() if "layers.1." in n and "expert_gate" not in n}
    stages = trace_groups(model, SAMPLE, names, [])[1:]
    kinds = [(stage.experts and stage.experts.name, len(stage.modules)) for stage in stages]
    dense = [(None, 3), (None, 1), (None, 2), (None, 1)]
    assert sorted(kinds, key=str) == sorted([*dense, ("model.layers.1.mlp.experts", 12)], key=str)
    (stage,) = [stage for stage in stages if stage.experts]
    assert [len(group) for e in stage.experts.experts for group in e.groups] == [2, 1] * 4
    assert None is not stage.chosen != stage.reads


@pytest.mark.parametrize("kind", ["qwen3", "mixtral", "qwen2"])
def test_each_layer_is_calibrated_under_the_models_own_attention(tmp_path, kind):
    """Upstream's tracer loses it where a config is passed on, and with it the causal mask."""
    model, seen = mixture(tmp_path, kind), []
    sample = {"input_ids": torch.arange(5, 45).reshape(2, 20)}
    query = model.model.layers[1].self_attn.q_proj
    query.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad(), calibration_forward_context(model), moe_calibration_context():
        layer = type(model.model.layers[0]).__name__
        subgraphs = trace_subgraphs(model, sample, [layer], ["create_causal_mask"], 1)
        configs = use_own_configs(model, subgraphs)
        cache = IntermediatesCache([{}], torch.device("cpu"))
        cache.update(0, sample)
        for subgraph in subgraphs:
            Stage([], None, [subgraph], configs).run(model, cache, 0)
        model(**sample, use_cache=False)
    torch.testing.assert_close(*seen)


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
    generated = dense.generate(**SAMPLE, max_new_tokens=3, do_sample=False)
    assert generated.shape[1] > 16  # with a cache, as before


@pytest.mark.parametrize("again", [False, True])
def test_a_tensor_changed_in_place_may_not_be_read_elsewhere(again):
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    made = graph.call_function(torch.zeros_like, (x,))
    graph.call_method("add_", (made, x))
    if again:
        graph.call_function(operator.add, (made, x))
        with pytest.raises(UntraceableError, match=r"in place \(add_\)"):
            _refuse_changes_in_place([SimpleNamespace(graph=graph)])
    else:
        _refuse_changes_in_place([SimpleNamespace(graph=graph)])
