"""Counted costs against the matrix products that the code really makes."""

import dataclasses

import pytest
import torch
from rac_modifier.pruning.statistics import GroupStatistics
from torch.utils._python_dispatch import TorchDispatchMode

from rac_modifier.pruning.cost import Group, Plan, groups_by_input, run_cost
from rac_modifier.pruning.dense_target import target_weights
from rac_modifier.pruning.solve import solve
from rac_modifier.pruning.sparsegpt import factorise
from rac_modifier.quantization.grid import Grid
from rac_modifier.quantization.solve import quantize
from rac_modifier.settings.pattern import Pattern
from tests.tiny import linears, tiny_model

PLAN = Plan("alps", False, "dense", "auto", "uniform", "uniform", 16, 3, tokens=700, held_out_tokens=0)


class Products(TorchDispatchMode):
    """Counts the multiply-adds of matrix products; factorisations are not seen."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            a, b = args[:2] if name == "mm" else args[1:3]
            self.count += a.shape[0] * a.shape[1] * b.shape[1]
        return func(*args, **(kwargs or {}))


def problem(columns: int, rows: tuple[int, ...]):
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(r, columns, generator=generator) for r in rows]
    x = torch.randn(700, columns, generator=generator)
    return weights, x, x + 0.1 * torch.randn(700, columns, generator=generator)


@pytest.mark.parametrize(("columns", "rows"), [(512, (256, 128)), (512, (100,))])
@pytest.mark.parametrize("reconstruct", ["dense", "pruned"])
def test_second_moments(columns, rows, reconstruct):
    weights, x, dense = problem(columns, rows)
    with Products() as products:
        statistics = GroupStatistics(weights, columns, x.device, reconstruct == "dense")
        statistics.add(x, torch.ones(700), dense)
        statistics.drift()
    plan = dataclasses.replace(PLAN, reconstruct=reconstruct)
    assert run_cost([Group(columns, rows)], plan).second_moments == pytest.approx(products.count)


@pytest.mark.parametrize(
    ("solver", "refit", "reconstruct"),
    [("alps", False, "dense"), ("alps", False, "pruned"), ("sparsegpt", True, "dense"), ("sparsegpt", False, "pruned")],
)
def test_solver(solver, refit, reconstruct):
    columns, rows = (512, (256, 256)) if solver == "alps" else (1536, (64, 64))
    weights, x, _ = problem(columns, rows)
    hessian = x.T @ x
    names = ["a", "b"]
    with Products() as products:
        factor, target = None, None
        if reconstruct == "dense":
            factor = factorise(hessian, 0.01, "x")
            target = target_weights(weights, weights, hessian, 0.01, names, factor=factor)
        solve(
            solver,
            weights,
            hessian,
            Pattern.unstructured(0.6),
            target=target,
            factor=factor,
            refit=refit,
            iterations=PLAN.iterations,
            refit_steps=PLAN.refit_steps,
        )
    plan = dataclasses.replace(PLAN, solver=solver, refit=refit, reconstruct=reconstruct)
    product = columns**2 * sum(rows)
    unseen = 0.0  # factorisations, inverses and triangular solves
    if reconstruct == "dense":
        unseen += columns**3 / 6 + product
    if solver == "alps":
        unseen += 2 * columns**3 / 2  # an inverse for each of two stages
    elif reconstruct != "dense":
        unseen += columns**3 / 6
    counted = run_cost([Group(columns, rows)], plan).solver - unseen
    assert (
        counted <= products.count <= 1.35 * counted
    )  # what happens inside blocks is not counted, and small for wide layers


def test_rounding():
    columns, rows = 1536, (64, 64)
    weights, x, _ = problem(columns, rows)
    hessian = x.T @ x
    factor = factorise(hessian, 0.01, "w")
    masks = [torch.ones_like(w, dtype=torch.bool) for w in weights]
    with Products() as products:
        quantize(
            weights,
            masks,
            weights,
            hessian,
            Grid("int", 8),
            names=["a", "b"],
            dtype=torch.float32,
            factor=factor,
            sweeps=2,
        )
    group = [Group(columns, rows)]
    added = run_cost(group, dataclasses.replace(PLAN, rounding_sweeps=2)).solver - run_cost(group, PLAN).solver
    assert added == pytest.approx(products.count, rel=0.15)  # blocks of a sweep have their triangles counted whole


def test_what_options_add():
    first, second = Group(64, (64, 32), "layer 0"), Group(64, (64,), "layer 0")
    groups, forward = [first, second], 700 * 64 * 160
    paper = run_cost(groups, dataclasses.replace(PLAN, order="layer", reconstruct="pruned", solver="sparsegpt"))
    assert paper.forward == 700 * first.weights
    two_layers = [*groups, dataclasses.replace(first, layer="layer 1"), dataclasses.replace(second, layer="layer 1")]
    again = run_cost(two_layers, dataclasses.replace(PLAN, order="layer", reconstruct="pruned", solver="sparsegpt"))
    assert again.forward == 700 * (first.weights + (first.weights + second.weights) + first.weights)
    assert run_cost(groups, dataclasses.replace(PLAN, reconstruct="pruned")).forward == 700 * first.weights
    assert run_cost(groups, PLAN).forward == 2 * 700 * first.weights
    assert run_cost(groups, PLAN).options == 0
    assert run_cost(groups, dataclasses.replace(PLAN, token_weights="gradient")).options == 3 * forward
    assert run_cost(groups, dataclasses.replace(PLAN, allocation="kl")).options == 4 * 2048 * 64 * 160
    assert run_cost(groups, dataclasses.replace(PLAN, held_out_tokens=350)).options == forward


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_groups_are_those_that_read_one_tensor(device):
    with torch.device(device):
        model = tiny_model()
    names = {module: name for name, module in linears(model).items()}
    shapes = [(64, (64, 32, 32)), (64, (64,)), (64, (128, 128)), (128, (64,))]
    layers = [[Group(columns, rows, f"model.layers.{i}") for columns, rows in shapes] for i in range(2)]
    assert groups_by_input(model, names) == layers[0] + layers[1]


def test_a_module_that_is_not_reached_stands_alone():
    model = tiny_model()
    stray = torch.nn.Linear(8, 4)
    assert groups_by_input(model, {stray: "stray"}) == [Group(8, (4,))]
