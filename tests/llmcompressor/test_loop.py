"""Group by group: the same as running the whole model anew before each group."""

import pytest
import torch
from llmcompressor import oneshot
from transformers import AutoModelForCausalLM

from rac_modifier import ReasoningAwareSparseGPTModifier, platform
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
                x, x_d, w = (
                    x.flatten(0, 1).double(),
                    x_d.flatten(0, 1).double(),
                    w.flatten().double(),
                )
                moment += ((x_d - x) * w.unsqueeze(1)).T @ x
            moment = (moment * 2 / hessian.weight_sum).float()
            weights = [m.weight.detach() for m in modules]
            cross_moment = [w @ moment for w in weights] if towards_dense else None
            solutions = solve(
                modifier.solver,
                weights,
                hessian.matrix(),
                Pattern.parse("2:4", None),
                cross_moment=cross_moment,
            )
            for module, s in zip(modules, solutions, strict=True):
                module.weight.data.copy_(s.weight)


@pytest.mark.usefixtures("float32_products")
@pytest.mark.parametrize("towards_dense", [False, True])
def test_it_is_pruning_each_group_on_a_model_run_anew(
    tiny_folder, trace_store, dense, towards_dense
):
    expected = AutoModelForCausalLM.from_pretrained(tiny_folder, attn_implementation="eager").eval()
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    settings = {
        "solver": "sparsegpt",
        "reconstruct": "dense" if towards_dense else "pruned",
        "order": "group",
    }
    modifier = prune(trace_store, model, **settings)
    reference(dense, expected, modifier, towards_dense=towards_dense)
    for (name, ours), theirs in zip(
        linears(model).items(), linears(expected).values(), strict=True
    ):
        # a tie that rounding turns another way changes single weights; the modules must agree
        close = torch.isclose(ours.weight, theirs.weight, rtol=1e-3, atol=1e-4).float().mean()
        assert close > 0.98, (name, float(close))


@pytest.mark.parametrize("preset", ["paper", "quality"])
def test_linear_layers_of_forward_passes_may_go_to_onednn(trace_store, dense, preset, monkeypatch):
    """Which products do: tests/test_platform.py. Here what is asked about, in both orders."""
    asked, inner = set(), platform._onednn_gains
    monkeypatch.setattr(
        platform, "_onednn_gains", lambda x, weight: asked.add(x.ndim) or inner(x, weight)
    )
    prune(trace_store, dense, preset=preset)
    assert 3 in asked, "[rows, tokens, columns] are activations of the model"
    asked.clear()
    with torch.no_grad():
        dense(torch.ones(1, 4, dtype=torch.long))
    assert not asked, "the run has ended"
