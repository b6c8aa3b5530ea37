"""The numbers of matrices that each step of a solver has, against the tensors that are alive; and attention by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from rac_modifier.llmcompressor.step_memory import Attention, SolverMemory
from rac_modifier.processes import Processes
from rac_modifier.pruning import alps, linalg
from rac_modifier.pruning.hessian import Statistics
from rac_modifier.pruning.solve import Problem, solve_many
from rac_modifier.quantization.grid import Grid
from rac_modifier.quantization.solve import PrunedProblem, quantize_many
from rac_modifier.settings.pattern import Pattern
from tests.llmcompressor.live_bytes import LiveBytes

INT4 = Grid("int", 4, 32)


def peak_of(memory: SolverMemory, columns: int, rows: int) -> int:
    """Most bytes of tensors from the sums of a group to its result, as llmcompressor/solving.py goes."""
    dtype = torch.float32 if memory.float32 else torch.bfloat16
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(rows, columns, generator=generator) / columns**0.5).to(dtype)
    if memory.solver == "keep":
        weight[:, ::2] = 0
    x = torch.randn(columns + 50, columns, generator=generator)
    statistics = Statistics(columns, "cpu", [weight] if memory.dense_target else None)
    statistics.add(x, torch.ones(len(x)), x + 0.1 * torch.randn(x.shape, generator=generator))
    statistics.finish(Processes())
    live, pattern = (
        LiveBytes(),
        Pattern.nothing() if memory.solver == "none" else Pattern.n_of_m(2, 4),
    )
    for sums in (statistics.hessian._sums, statistics._sums):
        if sums is not None:
            live.knows(sums.total)
    with live:
        given = weight.float() if memory.rounds else weight
        hessian = statistics.hessian.matrix(take=True)
        problem = Problem([given], hessian, [pattern], ["w"], statistics.cross_moment(take=True))
        refit = memory.refits and memory.solver == "sparsegpt"
        solved = solve_many(memory.solver, [problem], refit=refit, keep_factor=memory.rounds)
        if memory.rounds:
            grid = Grid("int", 4, 32, symmetric=False) if memory.zero_points else INT4
            quantize_many([PrunedProblem(solved[0], hessian, [grid])], dtype=dtype)
    return live.peak


CASES = {
    "paper": SolverMemory("sparsegpt"),
    "paper, bf16": SolverMemory("sparsegpt", float32=False),
    "sparsegpt, dense target": SolverMemory("sparsegpt", dense_target=True, float32=False),
    "fast": SolverMemory("sparsegpt", dense_target=True, refits=True, float32=False),
    "alps": SolverMemory("alps", refits=True),
    "quality": SolverMemory("alps", dense_target=True, refits=True),
    "quality, bf16": SolverMemory("alps", dense_target=True, refits=True, float32=False),
    "quality, int4": SolverMemory(
        "alps", dense_target=True, refits=True, rounds=True, float32=False
    ),
    "alps, int4": SolverMemory("alps", refits=True, rounds=True),
    "paper, int4": SolverMemory("sparsegpt", rounds=True, float32=False),
    "int4 alone": SolverMemory("none", rounds=True, float32=False),
    "int4 alone, zero points": SolverMemory("none", rounds=True, zero_points=True, float32=False),
    "int4 alone, dense target": SolverMemory("none", dense_target=True, rounds=True),
    "keep": SolverMemory(
        "keep", dense_target=True, refits=True
    ),  # else its weights fit, and no step is taken
    "wanda": SolverMemory("wanda"),
    "wanda, dense target": SolverMemory("wanda", dense_target=True),
}


@pytest.mark.parametrize("bf16", [True, False], ids=["bf16", "float32"])
@pytest.mark.parametrize("name", CASES)
def test_a_step_has_as_many_matrices_as_are_counted(name, bf16, monkeypatch):
    """Once where Hessians are nearly all of it, and once where weights are."""
    monkeypatch.setattr(linalg, "bf16_is_fast", lambda device: bf16)
    memory = SolverMemory(**{**vars(CASES[name]), "bf16": bf16})
    for columns, rows in ((512, 32), (256, 1024)):
        counted = 4 * max(memory.steps(columns, rows).values())
        assert 0.93 <= counted / peak_of(memory, columns, rows) <= 1.07, (columns, rows)


def test_the_scores_of_an_unstructured_mask_are_counted():
    """Beside the Hessian, the matrix, the weights and their target."""
    z, live = torch.randn(256, 4096, generator=torch.Generator().manual_seed(0)), LiveBytes()
    with live:
        alps._pruned(z, torch.ones(256, 1), [4096], [Pattern.unstructured(0.5)])
    counted = SolverMemory("alps").steps(256, 4096)["final mask"] - 2 * 256**2 - 2 * z.numel()
    assert 0.93 <= 4 * counted / live.peak <= 1.07


def test_attention_keeps_masks_and_has_its_scores_twice():
    config = SimpleNamespace(
        num_attention_heads=4, num_key_value_heads=2, hidden_size=32, head_dim=8
    )
    found = Attention.of(config, [(2, 10), (1, 16)], 4)
    assert found.kept == 4 * (2 * 100 + 256 + 2 * (20 + 16) * 8)
    assert found.peak == max(
        20 * 4 * (64 + (4 + 4 + 8) * 8) + 2 * 4 * 100 * 8, 16 * 4 * (64 + 128) + 4 * 256 * 8
    )
    whole = SimpleNamespace(
        num_attention_heads=4, num_key_value_heads=4, hidden_size=32, layer_types=["a", "b", "a"]
    )
    found = Attention.of(whole, [(1, 16)], 2)
    assert found.kept == 2 * (2 * 256 + 2 * 16 * 8)
    assert found.peak == 16 * 2 * (64 + 12 * 8) + 4 * 256 * 10


def test_a_model_without_attention_has_none():
    assert Attention.of(SimpleNamespace(hidden_size=8), [(1, 16)], 4) == Attention()
    assert Attention.of(SimpleNamespace(num_attention_heads=4, hidden_size=8), [], 4) == Attention()
