"""A group's modules pruned on several ranks (here threads): what one makes of all tokens."""

import random

import pytest
import torch

from rac_modifier.distributed.processes import ALONE
from rac_modifier.errors import RacError
from rac_modifier.formats.encoding import Encoding
from rac_modifier.llmcompressor import run as pruning_run
from rac_modifier.llmcompressor.quantizer import Quantizer
from rac_modifier.llmcompressor.resume import Resume
from rac_modifier.llmcompressor.run import Run
from rac_modifier.llmcompressor.solving import Pruned, solve_groups
from rac_modifier.llmcompressor.statistics import InputGroup
from rac_modifier.pruning import sparsegpt
from rac_modifier.pruning.hessian import Statistics
from rac_modifier.settings.entries import PruningEntry
from rac_modifier.settings.pattern import Pattern
from tests.llmcompressor.modifier_helpers import int4
from tests.meeting import together

ROWS = {"q": 24, "k": 8, "v": 8, "down": 16}
COLUMNS = 16
ENTRY = PruningEntry(mask_structure="2:4", solver="sparsegpt", reconstruct="dense", refit=False)
NO_SCHEMES = Quantizer(None, None, {}, prunes=True)


@pytest.fixture
def modules():
    return {name: torch.nn.Linear(COLUMNS, rows, bias=False) for name, rows in ROWS.items()}


@pytest.fixture
def batches():
    """Inputs in the pruned and in the dense model, of six batches."""
    inputs = [torch.randn(50, COLUMNS) @ torch.randn(COLUMNS, COLUMNS) for _ in range(6)]
    return [(x, x + 0.1 * torch.randn(x.shape)) for x in inputs]


def groups_of(members_and_factors, batches, processes=ALONE):
    """A group per list of modules, which reads its factor times x. Each batch is a shard."""
    groups = []
    for members, factor in members_and_factors:
        weights = [module.weight.detach() for module in members]
        statistics = Statistics(COLUMNS, "cpu", weights, processes)
        for x, dense in batches:
            statistics.add(x * factor, torch.ones(len(x)), dense * factor)
            statistics.end_shards(1)
        groups.append(InputGroup(list(members), statistics))
    return groups


def run_of(modules, processes=ALONE, entry=ENTRY):
    names = {module: name for name, module in modules.items()}
    patterns = dict.fromkeys(modules, Pattern.n_of_m(2, 4))
    return Run(entry, names, patterns, NO_SCHEMES, processes, False, Resume())


def attention_and_down(modules):
    return [([modules[n] for n in ("q", "k", "v")], 1.0), ([modules["down"]], 0.5)]


def pruned(modules, batches, processes, slow=None):
    """What becomes of each module, by name; `slow` is busy now and then."""
    run, solved, results = run_of(modules, processes), [], {}

    def solve(call):
        for _ in range(slow.randrange(10**5) if slow else 0):  # others go on meanwhile
            pass
        solved.extend(run.names[module] for group in call for module in group.modules)
        return solve_groups(ENTRY, call, run.names, run.patterns, NO_SCHEMES)

    run._solve = solve
    own = batches[processes.rank :: processes.count]
    if len(own) < -(-len(batches) // processes.count):  # a shard without tokens
        own = [*own, (batches[0][0][:0], batches[0][1][:0])]
    groups = groups_of(attention_and_down(modules), own, processes)
    for group, result in run.solve_on_all_ranks(groups, per_call=1):
        results |= zip((run.names[module] for module in group.modules), result, strict=True)
    return results, solved


@pytest.mark.parametrize("count", [2, 3, 4])
def test_they_end_as_one_rank_on_all_tokens_bit_by_bit(modules, batches, count):
    expected, _ = pruned(modules, batches, ALONE)
    for seed in range(2):  # whoever is slow
        ends = together(
            count,
            lambda processes, seed=seed: pruned(
                modules, batches, processes, random.Random(seed + processes.rank)
            ),
        )
        assert sorted(name for _, solved in ends for name in solved) == sorted(modules)
        assert sum(bool(solved) for _, solved in ends) == 2  # q, k and v together
        for results, _ in ends:
            for name, result in results.items():
                assert torch.equal(result.weight, expected[name].weight)
                assert result.record == expected[name].record
                assert result.record["tokens"] == 300


def test_scales_masters_and_records_reach_all(modules, batches, monkeypatch):
    names = {module: name for name, module in modules.items()}

    def made(module):
        weight = module.weight.detach()
        rounded = names[module] != "k"  # k is not rounded
        scale = torch.full((len(weight), 1), 0.5) if rounded else None
        zeros = torch.full((len(weight), 1), -3, dtype=torch.int8) if names[module] == "v" else None
        master = weight * 2 if rounded else None
        return Pruned({"name": names[module]}, weight + 1, scale, zeros, master)

    def solve(entry, call, *_):
        return [[made(module) for module in group.modules] for group in call]

    monkeypatch.setattr(pruning_run, "solve_groups", solve)

    def run(processes):
        groups = groups_of(attention_and_down(modules), batches, processes)
        return {
            module: result
            for group, results in run_of(modules, processes).solve_on_all_ranks(groups, 1)
            for module, result in zip(group.modules, results, strict=True)
        }

    for results in (run(ALONE), *together(2, run)):
        assert results.keys() == set(modules.values())
        for module, result in results.items():
            expected = made(module)
            assert result.record == expected.record
            for part in ("weight", "scale", "zero_point", "master"):
                ours, theirs = getattr(result, part), getattr(expected, part)
                assert (ours is None) == (theirs is None)
                assert ours is None or (torch.equal(ours, theirs) and ours.dtype == theirs.dtype)


@pytest.mark.parametrize(("solver", "expected"), [("sparsegpt", [2, 1, 1, 2]), ("alps", [1] * 6)])
def test_small_neighbours_of_one_shape_are_solved_together(monkeypatch, batches, solver, expected):
    """At most two of 8 rows: of the first three, and of the last two; 16 rows are alone."""
    monkeypatch.setattr(sparsegpt, "_BATCH_ON_CPU", 2 * COLUMNS * 8 + 1)
    rows = (8, 8, 8, 16, 8, 8)
    modules = {str(i): torch.nn.Linear(COLUMNS, r, bias=False) for i, r in enumerate(rows)}
    calls, entry = [], ENTRY.model_copy(update={"solver": solver})
    run = run_of(modules, entry=entry)

    def solved(call):
        return solve_groups(entry, call, run.names, run.patterns, NO_SCHEMES)

    def made():
        members = [([module], 1 + i) for i, module in enumerate(modules.values())]
        groups = groups_of(members, batches)
        for group in groups:
            group.statistics.finish()
        return groups

    run._solve = lambda call: (calls.append(len(call)), solved(call))[1]
    solved_groups = run.solve_on_all_ranks(made())
    results = {run.names[group.modules[0]]: result for group, (result,) in solved_groups}
    assert calls == expected
    for name, group in zip(modules, made(), strict=True):
        ((alone,),) = solved([group])
        assert results[name].record["name"] == name
        assert torch.equal(results[name].weight != 0, alone.weight != 0)
        torch.testing.assert_close(results[name].weight, alone.weight)


def test_ranks_that_calibrated_other_modules_are_refused(modules):
    def run(processes):
        groups = groups_of(attention_and_down(modules), [], processes)[: 2 - processes.rank]
        return list(run_of(modules, processes).solve_on_all_ranks(groups, 1))

    with pytest.raises(RacError, match=r"have not calibrated the same modules \(down\): .*fewer"):
        together(2, run)


def test_an_error_names_the_module(modules, batches):
    batches[0][0][0, 0] = float("inf")
    with pytest.raises(RacError, match="q: activations of 1 of 16 inputs are not finite"):
        pruned(modules, batches, ALONE)


class Rounding:
    """A quantizer of all modules to 4 bits in groups of 8."""

    def __init__(self, modules, symmetric=True):
        self.grids = dict.fromkeys(modules, Encoding("int", 4, 8, symmetric))
        self.described = dict.fromkeys(ROWS, "int4")


@pytest.mark.parametrize(("solver", "symmetric"), [("alps", True), ("none", True), ("none", False)])
def test_training_starts_with_the_codes_that_are_saved(modules, batches, solver, symmetric):
    """Each master weight rounds to its code, and lies on the side of the weight before rounding."""
    what = {"solver": "none"} if solver == "none" else {"mask_structure": "2:4"}
    entry = PruningEntry(**what, quantization=int4(), recover={"tokens": 100})
    names = {module: name for name, module in modules.items()}
    pattern = Pattern.nothing() if solver == "none" else Pattern.n_of_m(2, 4)
    of_all, quantizer = dict.fromkeys(modules, pattern), Rounding(names, symmetric)
    for group in groups_of(attention_and_down(modules), batches):
        (results,) = solve_groups(entry, [group], names, of_all, quantizer)
        for result in results:
            steps = result.scale.repeat_interleave(8, dim=1)
            codes = (result.weight / steps).round()
            assert (result.zero_point is None) == symmetric
            if not symmetric:  # codes that are stored
                stored = codes + result.zero_point.repeat_interleave(8, dim=1)
                assert bool(((stored >= -8) & (stored <= 7)).all())
            assert torch.equal((result.master / steps).round(), codes)
            off = (result.master / steps - codes).abs()
            assert 0.1 < off[codes != 0].mean() < 0.45, "within the cells, not in their middle"
            if solver == "alps":
                assert bool((result.master.unflatten(1, (-1, 4)) == 0).sum(-1).ge(2).all())
            else:
                assert (result.master != 0).float().mean() > 0.99
