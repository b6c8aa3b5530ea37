"""`solver: keep`: the pattern is read off the zeros that a model has."""

import json

import pytest
import torch

from rac_modifier import RacError
from rac_modifier.checkpoint.inspect import inspect_checkpoint
from tests.tiny import linears


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
