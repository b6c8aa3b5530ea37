"""Experts against their definition: pruned on exactly the tokens that are routed to each."""

import pytest
import torch.nn.functional as F
from llmcompressor.modeling.moe.linearize import linearize_moe

from tests.llmcompressor.definitions import (
    O_PROJ,
    QKV,
    assert_close,
    eager,
    given_to,
    prune_by_definition,
    run_on,
)
from tests.tiny import EXPERTS, save_tiny_experts

FLOOR = 700


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    return save_tiny_experts(tmp_path_factory.mktemp("experts") / "dense", num_hidden_layers=1)


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
def test_a_mixture_is_pruned_group_by_group_as_if_run_anew_before_each(mixture):
    model, store = linearize_moe(eager(mixture)), mixture.parent / "traces.jsonl"
    settings = {"solver": "sparsegpt", "reconstruct": "dense", "expert_floor": FLOOR}
    loader = run_on(model, store, **settings).calibration_set.loader
    expected, original = linearize_moe(eager(mixture)), linearize_moe(eager(mixture))
    layer, of_dense = expected.model.layers[0], original.model.layers[0]
    for group in (QKV, O_PROJ):
        modules = [layer.get_submodule(name) for name in group]
        (x,), weights = given_to(expected, modules[0], loader)
        (x_dense,), _ = given_to(original, of_dense.get_submodule(group[0]), loader)
        prune_by_definition(modules, x, x_dense, weights)
    (x, chosen, _), weights = given_to(expected, layer.mlp.experts, loader)
    (x_dense, _, _), _ = given_to(original, of_dense.mlp.experts, loader)
    routed = [int(((chosen == n).any(1) & (weights > 0)).sum()) for n in range(EXPERTS)]
    assert min(routed) < FLOOR < max(routed), "the floor matters for some experts"
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
