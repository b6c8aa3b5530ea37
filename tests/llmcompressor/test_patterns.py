"""Which pattern each module gets."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rac_modifier
from rac_modifier.checkpoint.inspect import inspect_checkpoint
from rac_modifier.errors import RacError
from rac_modifier.llmcompressor.patterns import allocated_shares, patterns_for
from tests.tiny import linears


@given(
    st.lists(st.tuples(st.integers(2, 5000), st.floats(0.0, 1.0)), min_size=1, max_size=12),
    st.floats(0.05, 0.95),
)
@settings(max_examples=200, deadline=None)
def test_the_total_is_exact_to_the_weight(modules, sparsity):
    sizes = {f"m{i}": size for i, (size, _) in enumerate(modules)}
    shares = {f"m{i}": share for i, (_, share) in enumerate(modules)}
    budget = int(sum(sizes.values()) * sparsity)
    if not len(sizes) <= budget <= sum(sizes.values()) - len(sizes):
        return
    patterns = patterns_for(shares, sizes, sparsity)
    # as the solvers count
    assert sum(int(sizes[name] * pattern.sparsity) for name, pattern in patterns.items()) == budget


def test_shares_that_fit_are_kept():
    sizes = {"a": 100, "b": 300}
    patterns = patterns_for({"a": 0.8, "b": 0.4}, sizes, 0.5)
    assert {n: int(sizes[n] * p.sparsity) for n, p in patterns.items()} == {"a": 80, "b": 120}


def test_modules_off_the_list_take_what_is_missing():
    assert allocated_shares({"a": 0.8}, {"a": 100, "b": 300, "c": 100}, 0.5) == pytest.approx(
        {"a": 0.8, "b": 0.425, "c": 0.425}
    )
    assert allocated_shares({"a": 0.8, "b": 0.4}, {"a": 100, "b": 300}, 0.5) == {"a": 0.8, "b": 0.4}


def test_a_list_that_cannot_average_is_refused():
    with pytest.raises(RacError, match=r"names every module and prunes 0\.7500"):
        allocated_shares({"a": 0.75, "b": 0.75}, {"a": 10, "b": 10}, 0.5)
    with pytest.raises(RacError, match=r"a share of -0\.300"):
        allocated_shares({"a": 0.9}, {"a": 300, "b": 100}, 0.6)


def zeros(model) -> dict[str, int]:
    return {name: int((module.weight == 0).sum()) for name, module in linears(model).items()}


def total(model) -> int:
    return sum(module.weight.numel() for module in linears(model).values())


def test_the_average_is_exact_and_each_module_has_its_own(prune, tmp_path):
    model = prune(
        mask_structure="0:0",
        sparsity=0.6,
        allocation={"re:.*down_proj": 0.3, "model.layers.0.mlp.down_proj": 0.5},
        reconstruct="pruned",
        output_dir=tmp_path / "out",
    )
    assert sum(zeros(model).values()) == int(total(model) * 0.6)
    record = json.loads((tmp_path / "out" / "rac_run.json").read_text())
    shares = {module["name"]: module["sparsity"] for module in record["modules"]}
    assert len(set(shares.values())) > 2
    for name, module in linears(model).items():
        assert shares[name] == pytest.approx(zeros(model)[name] / module.weight.numel())
    assert shares["model.layers.0.mlp.down_proj"] == pytest.approx(0.5, abs=1e-3)
    assert shares["model.layers.1.mlp.down_proj"] == pytest.approx(0.3, abs=1e-3)
    assert "more in some modules than in others" in record["pattern"]
    assert zeros(rac_modifier.load_model(tmp_path / "out")) == zeros(model)


@pytest.mark.parametrize("solver", ["sparsegpt", "wanda", "magnitude"])
def test_every_solver_prunes_each_module_by_its_share(prune, solver):
    model = prune(
        mask_structure="0:0",
        sparsity=0.5,
        solver=solver,
        reconstruct="pruned",
        allocation={"re:.*q_proj": 0.8, "re:.*k_proj": 0.2},
    )
    counts = zeros(model)
    for name, module in linears(model).items():
        wanted = 0.8 if "q_proj" in name else 0.2 if "k_proj" in name else None
        if wanted:
            assert counts[name] / module.weight.numel() == pytest.approx(wanted, abs=0.02)
    assert sum(counts.values()) == pytest.approx(total(model) * 0.5, abs=14 * 64)


def test_a_module_that_lost_its_own_pattern_is_refused_at_save(prune, tmp_path):
    model = prune(
        mask_structure="0:0", sparsity=0.5, allocation={"model.layers.0.mlp.up_proj": 0.9}
    )
    module = model.model.layers[0].mlp.up_proj
    module.weight.data[:32] = 1.0  # half of it: enough zeros are left for 50 %, not for its 90 %
    with pytest.raises(RacError, match=r"layers\.0\.mlp\.up_proj .*90 %"):
        model.save_pretrained(tmp_path / "out")


def test_keep_refuses_a_model_without_the_zeros(prune):
    with pytest.raises(RacError, match="solver: keep keeps the zeros that a model has"):
        prune(solver="keep")


def test_keep_needs_no_pattern_and_keeps_exactly_the_zeros(prune, tmp_path, off_policy):
    """Where all modules hold 2:4 it is stored as 2:4; else each has its own share of zeros."""
    settings = {"solver": "keep", "mask_structure": None, "traces": off_policy}
    sparse = prune()
    zeros = {name: module.weight == 0 for name, module in linears(sparse).items()}
    kept = prune(model=sparse, output_dir=tmp_path / "structured", **settings)
    assert all(
        torch.equal(module.weight == 0, zeros[name]) for name, module in linears(kept).items()
    )
    record = json.loads((tmp_path / "structured" / "rac_run.json").read_text())
    assert record["mask_structure"] == "2:4"
    assert {row.structure for row in inspect_checkpoint(tmp_path / "structured").sparse} == {"2:4"}

    uneven = prune(mask_structure=None, sparsity=0.3, allocation={"re:.*q_proj": 0.6})
    zeros = {name: module.weight == 0 for name, module in linears(uneven).items()}
    kept = prune(model=uneven, output_dir=tmp_path / "uneven", **settings)
    assert all(
        torch.equal(module.weight == 0, zeros[name]) for name, module in linears(kept).items()
    )
    record = json.loads((tmp_path / "uneven" / "rac_run.json").read_text())
    assert record["mask_structure"] == "0:0"
    assert record["pattern"] == "the zeros that the model had, 30 % of the weights"
    assert len({round(module["sparsity"], 2) for module in record["modules"]}) > 1


@pytest.mark.parametrize("mask_structure", [None, "0:0"])
def test_keep_without_a_pattern_refuses_a_dense_module(prune, dense, mask_structure):
    with pytest.raises(
        RacError,
        match=r"solver: keep keeps the zeros .* lacks them \(0 of its 4,096 weights are zero\)",
    ):
        prune(model=dense, solver="keep", mask_structure=mask_structure)


def test_keep_may_store_2_of_4_zeros_without_a_structure(prune, tmp_path, off_policy):
    prune(
        model=prune(),
        solver="keep",
        mask_structure="0:0",
        traces=off_policy,
        output_dir=tmp_path / "out",
    )
    assert {row.structure for row in inspect_checkpoint(tmp_path / "out").sparse} == {
        "unstructured"
    }
