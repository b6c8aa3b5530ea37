"""Group by group: the same as running the whole model anew before each group."""

import pytest
import torch
from llmcompressor import oneshot
from loguru import logger
from transformers import AutoModelForCausalLM

from rac_modifier import RacError, ReasoningAwareSparseGPTModifier
from rac_modifier.llmcompressor import pipeline as seam
from rac_modifier.llmcompressor.stages import UntraceableError, trace_stages
from rac_modifier.pruning.hessian import Hessian
from rac_modifier.pruning.solve import solve
from rac_modifier.settings.pattern import Pattern
from tests.tiny import entry, linears

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


def prune(trace_store, model, **settings):
    modifier = ReasoningAwareSparseGPTModifier(**entry(trace_store, **settings))
    oneshot(model=model, recipe=modifier)
    return modifier


def inputs(model, module, batches):
    """What `module` reads, for each batch."""
    seen = []
    hook = module.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach()))
    with torch.no_grad():
        for batch in batches:
            model(**batch, use_cache=False)
    hook.remove()
    return seen


def reference(dense, pruned, modifier, *, towards_dense):
    """The definition: before each group, run both models from the beginning."""
    loader = modifier._calibration.loader
    batches = list(loader)
    for layer in range(len(pruned.model.layers)):
        for group in GROUPS:
            names = [f"model.layers.{layer}.{name}" for name in group]
            modules = [pruned.get_submodule(name) for name in names]
            x_pruned = inputs(pruned, modules[0], batches)
            x_dense = inputs(dense, dense.get_submodule(names[0]), batches)
            hessian = Hessian(x_pruned[0].shape[-1])
            moment = torch.zeros(x_pruned[0].shape[-1], x_pruned[0].shape[-1], dtype=torch.float64)
            for x, x_d, w in zip(x_pruned, x_dense, loader.token_weights, strict=True):
                hessian.add(x, w)
                x, x_d, w = x.flatten(0, 1).double(), x_d.flatten(0, 1).double(), w.flatten().double()
                moment += ((x_d - x) * w.unsqueeze(1)).T @ x
            moment = (moment * 2 / hessian.weight_sum).float()
            weights = [m.weight.detach() for m in modules]
            cross_moment = [w @ moment for w in weights] if towards_dense else None
            solutions = solve(
                modifier.solver, weights, hessian.matrix(), Pattern.parse("2:4", None), cross_moment=cross_moment
            )
            for module, s in zip(modules, solutions, strict=True):
                module.weight.data.copy_(s.weight)


@pytest.mark.usefixtures("float32_products")
@pytest.mark.parametrize("towards_dense", [False, True])
def test_it_is_pruning_each_group_on_a_model_run_anew(tiny_folder, trace_store, dense, towards_dense):
    expected = AutoModelForCausalLM.from_pretrained(tiny_folder, attn_implementation="eager").eval()
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    settings = {"solver": "sparsegpt", "reconstruct": "dense" if towards_dense else "pruned", "order": "group"}
    modifier = prune(trace_store, model, **settings)
    reference(dense, expected, modifier, towards_dense=towards_dense)
    for (name, ours), theirs in zip(linears(model).items(), linears(expected).values(), strict=True):
        # a tie that rounding turns another way changes single weights; the modules must agree
        close = torch.isclose(ours.weight, theirs.weight, rtol=1e-3, atol=1e-4).float().mean()
        assert close > 0.98, (name, float(close))


def test_stages_begin_where_modules_read_the_same_tensor(dense):
    names = {module: name for name, module in linears(dense).items()}
    stages = trace_stages(dense, SAMPLE, names, [])
    assert not stages[0].modules
    assert [[names[m] for m in stage.modules] for stage in stages[1:]] == [
        [f"model.layers.{layer}.{name}" for name in group] for layer in range(2) for group in GROUPS
    ]


def test_modules_left_alone_run_inside_the_stages(dense):
    names = {m: n for n, m in linears(dense).items() if "q_proj" in n or "v_proj" in n}
    stages = trace_stages(dense, SAMPLE, names, [])
    assert [[names[m].split(".")[-1] for m in stage.modules] for stage in stages[1:]] == [["q_proj", "v_proj"]] * 2


def test_a_module_that_is_called_twice_cannot_be_staged(dense):
    dense.model.layers[1].mlp = dense.model.layers[0].mlp
    names = {dense.model.layers[0].mlp.down_proj: "model.layers.0.mlp.down_proj"}
    with pytest.raises(UntraceableError, match=r"down_proj is called 2 times"):
        trace_stages(dense, SAMPLE, names, [])


def test_too_little_memory_is_said_before_pruning(tiny_folder, trace_store, monkeypatch):
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 1000}))
    said = []
    sink = logger.add(said.append, level="WARNING")
    prune(trace_store, str(tiny_folder))
    logger.remove(sink)
    assert any("of activations will be kept on cpu" in text and "fewer tokens" in text for text in said)


def untraceable(*args, **kwargs):
    raise UntraceableError("tracing failed: a loop over experts")


def test_auto_goes_layer_by_layer_where_it_must_and_says_so(tiny_folder, trace_store, monkeypatch):
    monkeypatch.setattr(seam, "trace_stages", untraceable)
    modifier = prune(trace_store, str(tiny_folder))
    assert modifier._plan().record["order"] == {
        "order": "layer",
        "why": "tracing failed: a loop over experts",
        "reconstruct": "pruned",
    }


def test_group_is_refused_where_it_cannot_be(tiny_folder, trace_store, monkeypatch):
    monkeypatch.setattr(seam, "trace_stages", untraceable)
    with pytest.raises(RacError, match=r"order: group is not possible here: tracing failed.*set order: layer"):
        prune(trace_store, str(tiny_folder), order="group")


def test_gradient_weights_need_the_group_order(tiny_folder, trace_store, monkeypatch):
    monkeypatch.setattr(seam, "trace_stages", untraceable)
    with pytest.raises(
        RacError, match=r"token_weights: gradient is not possible here.*leave experimental.token_weights out"
    ):
        prune(trace_store, str(tiny_folder), experimental={"token_weights": "gradient"})
