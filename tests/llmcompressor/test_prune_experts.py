"""Experts pruned one by one: the same as running the whole model anew before each group, on exactly the tokens routed to each."""

import pytest
import torch
import torch.nn.functional as F
from llmcompressor import oneshot
from llmcompressor.modeling.moe.linearize import linearize_moe
from transformers import AutoModelForCausalLM

from rac_modifier import ReasoningAwareSparseGPTModifier
from rac_modifier.llmcompressor.run import Run
from rac_modifier.pruning.solve import solve
from rac_modifier.settings.pattern import Pattern
from tests.tiny import EXPERTS, entry, save_tiny_experts

FLOOR = 700
ATTENTION = [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_experts(tmp_path_factory.mktemp("experts") / "dense", num_hidden_layers=1)


def dense(folder):
    return linearize_moe(
        AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    )


@pytest.fixture
def prune(folder, monkeypatch):
    """Prune with these settings; return the model, the modifier and the Hessian of each module by name."""
    hessians, inner = {}, Run.prune

    def spy(self, groups, per_call=None):
        for group in groups:
            for module in group.modules:
                hessians[self.names[module]] = group.statistics.hessian.matrix().double()
        inner(self, groups, per_call)

    monkeypatch.setattr(Run, "prune", spy)

    def prune(**settings):
        hessians.clear()
        options = entry(folder.parent / "traces.jsonl", solver="sparsegpt", **settings)
        modifier, model = ReasoningAwareSparseGPTModifier(**options), dense(folder)
        oneshot(model=model, recipe=modifier)
        return model, modifier, dict(hessians)

    return prune


def given_to(model, module, loader):
    """The arguments of `module` for all tokens of the calibration set, joined, and the weight of each token."""
    seen = []
    hook = module.register_forward_pre_hook(
        lambda m, args: seen.append([a.detach().flatten(0, -2) for a in args])
    )
    with torch.no_grad():
        for batch in loader:
            model(**batch, use_cache=False)
    hook.remove()
    return [torch.cat(parts) for parts in zip(*seen, strict=True)], torch.cat(
        [w.flatten() for w in loader.token_weights]
    )


def used_rows(x, router, chosen, weights, expert, floor):
    """The definition: bool per token, those routed to the expert, and the nearest other ones up to the floor."""
    real = weights > 0
    own = (chosen == expert).any(1) & real
    others = [i for i in range(len(own)) if real[i] and not own[i]]
    missing = min(max(floor - int(own.sum()), 0), len(others))
    share = (x @ router.weight.T).softmax(1)
    near = share[:, expert] / share.gather(1, chosen).min(1).values
    own[sorted(others, key=lambda i: -float(near[i].detach()))[:missing]] = True
    return own


def moment(x, weights):
    x, weights = x.double(), weights.double()
    return 2 / weights.sum() * (x * weights.unsqueeze(1)).T @ x


@pytest.mark.usefixtures("float32_products")
@pytest.mark.parametrize("floor", [1, FLOOR])
def test_the_hessian_of_an_expert_is_that_of_its_own_tokens(prune, floor):
    model, modifier, hessians = prune(reconstruct="pruned", expert_floor=floor)
    layer, loader = model.model.layers[0], modifier.calibration_set.loader
    (x, chosen, _), weights = given_to(
        model, layer.mlp.experts, loader
    )  # what the experts read does not depend on them
    counts, everyone = [], moment(x[weights > 0], weights[weights > 0])
    for number in range(EXPERTS):
        rows, expert = (
            used_rows(x, layer.mlp.gate, chosen, weights, number, floor),
            layer.mlp.experts[number],
        )
        name = f"model.layers.0.mlp.experts.{number}"
        ours, expected = hessians[f"{name}.gate_proj"], moment(x[rows], weights[rows])
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(ours, hessians[f"{name}.up_proj"])
        # far from what all tokens would have given, so this test fails if they are used
        assert (ours - everyone).norm() > 0.02 * everyone.norm()
        down = F.silu(F.linear(x[rows], expert.gate_proj.weight)) * F.linear(
            x[rows], expert.up_proj.weight
        )
        torch.testing.assert_close(
            hessians[f"{name}.down_proj"], moment(down, weights[rows]), rtol=1e-4, atol=1e-6
        )
        counts.append(int(((chosen == number).any(1) & (weights > 0)).sum()))
    assert min(counts) < FLOOR < max(counts), "the floor matters for some experts, and not for all"


@pytest.mark.usefixtures("float32_products")
def test_all_tokens_are_used_where_that_is_asked_for(folder, prune):
    model, modifier, hessians = prune(reconstruct="pruned", experts="all")
    (x, _, _), weights = given_to(
        model, model.model.layers[0].mlp.experts, modifier.calibration_set.loader
    )
    everyone = moment(x[weights > 0], weights[weights > 0])
    for number in range(EXPERTS):
        ours = hessians[f"model.layers.0.mlp.experts.{number}.gate_proj"]
        torch.testing.assert_close(ours, everyone, rtol=1e-4, atol=1e-5)


def pruned_group(modules, x, x_dense, weights):
    """New weights of modules that read the same input."""
    x, x_dense, w = (
        x[weights > 0].double(),
        x_dense[weights > 0].double(),
        weights[weights > 0].double(),
    )
    cross = 2 / w.sum() * ((x_dense - x) * w.unsqueeze(1)).T @ x
    dense_weights = [module.weight.detach() for module in modules]
    found = solve(
        "sparsegpt",
        dense_weights,
        moment(x, w).float(),
        Pattern.parse("2:4", None),
        cross_moment=[weight @ cross.float() for weight in dense_weights],
    )
    for module, solution in zip(modules, found, strict=True):
        module.weight.data.copy_(solution.weight)


@pytest.mark.usefixtures("float32_products")
def test_it_is_pruning_each_group_on_a_model_run_anew(folder, prune):
    model, modifier, _ = prune(expert_floor=FLOOR)
    expected, original, loader = dense(folder), dense(folder), modifier.calibration_set.loader
    layer, of_dense = expected.model.layers[0], original.model.layers[0]
    for group in ATTENTION:
        modules = [layer.get_submodule(name) for name in group]
        (x,), weights = given_to(expected, modules[0], loader)
        (x_dense,), _ = given_to(original, of_dense.get_submodule(group[0]), loader)
        pruned_group(modules, x, x_dense, weights)
    (x, chosen, _), weights = given_to(expected, layer.mlp.experts, loader)
    (x_dense, _, _), _ = given_to(original, of_dense.mlp.experts, loader)
    for number in range(EXPERTS):
        rows = used_rows(x, layer.mlp.gate, chosen, weights, number, FLOOR)
        expert, dense_expert = layer.mlp.experts[number], of_dense.mlp.experts[number]
        pruned_group([expert.up_proj, expert.gate_proj], x[rows], x_dense[rows], weights[rows])
        down, down_dense = (
            F.silu(F.linear(read[rows], e.gate_proj.weight))
            * F.linear(read[rows], e.up_proj.weight)
            for e, read in ((expert, x), (dense_expert, x_dense))
        )
        pruned_group([expert.down_proj], down.detach(), down_dense.detach(), weights[rows])
    for (name, ours), theirs in zip(model.named_parameters(), expected.parameters(), strict=True):
        # a tie that rounding turns another way changes single weights; the modules must agree
        close = torch.isclose(ours, theirs, rtol=1e-3, atol=1e-4).float().mean()
        assert close > 0.98, (name, float(close))


def test_each_expert_ends_closer_to_the_dense_one_on_its_tokens_than_with_all_tokens(folder, prune):
    """What the whole is for, measured on the outputs of the layer."""
    errors = {}
    for experts in ("routed", "all"):
        model, modifier, _ = prune(
            experts=experts, **({"expert_floor": 64} if experts == "routed" else {})
        )
        loader = modifier.calibration_set.loader
        outputs = []
        for one in (model, dense(folder)):
            (x,), weights = given_to(one, one.model.norm, loader)
            outputs.append(x[weights > 0])
        errors[experts] = float((outputs[0] - outputs[1]).norm())
    assert errors["routed"] < errors["all"], errors
