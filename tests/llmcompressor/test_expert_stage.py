"""Experts against their definition: pruned on exactly the tokens that are routed to each."""

import copy

import pytest
import torch
import torch.nn.functional as F
from llmcompressor.modeling.moe.linearize import linearize_moe

from rac_modifier.llmcompressor.run import Run
from tests.llmcompressor.definitions import (
    O_PROJ,
    QKV,
    assert_close,
    eager,
    given_to,
    moment,
    prune_by_definition,
    run_on,
)
from tests.tiny import EXPERTS, save_tiny_experts

FLOOR, ALL = 700, 10**9


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    return save_tiny_experts(tmp_path_factory.mktemp("experts") / "dense", num_hidden_layers=1)


@pytest.fixture
def prune_mixture(mixture, monkeypatch):
    """Prune with these settings; return the model, the loader and each module's Hessian by name."""
    hessians, inner = {}, Run.prune

    def spy(self, groups, per_call=None):
        for group in groups:
            hessian = copy.deepcopy(group.statistics.hessian).take().double()
            hessians.update(dict.fromkeys([self.names[m] for m in group.modules], hessian))
        inner(self, groups, per_call)

    monkeypatch.setattr(Run, "prune", spy)

    def prune_mixture(**settings):
        hessians.clear()
        model = linearize_moe(eager(mixture))
        store = mixture.parent / "traces.jsonl"
        modifier = run_on(model, store, solver="sparsegpt", **settings)
        return model, modifier.calibration_set.loader, dict(hessians)

    return prune_mixture


def used_rows(x, router, chosen, weights, expert, floor):
    """The definition: tokens routed to the expert, and the nearest other ones up to the floor."""
    real = weights > 0
    own = (chosen == expert).any(1) & real
    others = [i for i in range(len(own)) if real[i] and not own[i]]
    missing = min(max(floor - int(own.sum()), 0), len(others))
    share = (x @ router.weight.T).softmax(1)
    near = share[:, expert] / share.gather(1, chosen).min(1).values
    own[sorted(others, key=lambda i: -float(near[i].detach()))[:missing]] = True
    return own


@pytest.mark.usefixtures("float32_products")
@pytest.mark.parametrize("floor", [1, FLOOR, ALL])
def test_the_hessian_of_an_expert_is_that_of_its_tokens(prune_mixture, floor):
    model, loader, hessians = prune_mixture(reconstruct="pruned", expert_floor=floor)
    layer = model.model.layers[0]
    (x, chosen, _), weights = given_to(model, layer.mlp.experts, loader)
    counts, everyone = [], moment(x, weights)
    for number in range(EXPERTS):
        name, expert = f"model.layers.0.mlp.experts.{number}", layer.mlp.experts[number]
        ours = hessians[f"{name}.gate_proj"]
        if floor == ALL:
            torch.testing.assert_close(ours, everyone, rtol=1e-4, atol=1e-5)
            continue
        rows = used_rows(x, layer.mlp.gate, chosen, weights, number, floor)
        torch.testing.assert_close(ours, moment(x[rows], weights[rows]), rtol=1e-4, atol=1e-5)
        assert torch.equal(ours, hessians[f"{name}.up_proj"])
        # far from what all tokens would have given, so this test fails if they are used
        assert (ours - everyone).norm() > 0.02 * everyone.norm()
        gate, up = (F.linear(x[rows], getattr(expert, p).weight) for p in ("gate_proj", "up_proj"))
        down = moment(F.silu(gate) * up, weights[rows])
        torch.testing.assert_close(hessians[f"{name}.down_proj"], down, rtol=1e-4, atol=1e-6)
        counts.append(int(((chosen == number).any(1) & (weights > 0)).sum()))
    if floor != ALL:
        assert min(counts) < FLOOR < max(counts), "the floor matters for some experts"


@pytest.mark.usefixtures("float32_products")
def test_a_mixture_is_pruned_group_by_group_as_if_run_anew_before_each(mixture, prune_mixture):
    model, loader, _ = prune_mixture(reconstruct="dense", expert_floor=FLOOR)
    expected, original = linearize_moe(eager(mixture)), linearize_moe(eager(mixture))
    layer, of_dense = expected.model.layers[0], original.model.layers[0]
    for group in (QKV, O_PROJ):
        modules = [layer.get_submodule(name) for name in group]
        (x,), weights = given_to(expected, modules[0], loader)
        (x_dense,), _ = given_to(original, of_dense.get_submodule(group[0]), loader)
        prune_by_definition(modules, x, x_dense, weights)
    (x, chosen, _), weights = given_to(expected, layer.mlp.experts, loader)
    (x_dense, _, _), _ = given_to(original, of_dense.mlp.experts, loader)
    for number in range(EXPERTS):
        rows = used_rows(x, layer.mlp.gate, chosen, weights, number, FLOOR)
        expert, dense_expert = layer.mlp.experts[number], of_dense.mlp.experts[number]
        modules = [expert.up_proj, expert.gate_proj]
        prune_by_definition(modules, x[rows], x_dense[rows], weights[rows])
        down, down_dense = (
            F.silu(F.linear(read[rows], e.gate_proj.weight))
            * F.linear(read[rows], e.up_proj.weight)
            for e, read in ((expert, x), (dense_expert, x_dense))
        )
        prune_by_definition([expert.down_proj], down.detach(), down_dense.detach(), weights[rows])
    assert_close(model, expected)
