"""A group's modules pruned in several processes (here threads): what one process makes of all tokens, whoever is slow."""

import random

import pytest
import torch

from rac_modifier.errors import RacError
from rac_modifier.llmcompressor.quantizer import NoQuantizer
from rac_modifier.llmcompressor.solving import (
    Pruned,
    owners,
    problems_per_call,
    solve_groups,
    solve_on_all_ranks,
)
from rac_modifier.llmcompressor.statistics import InputGroup, end_shards
from rac_modifier.processes import Processes
from rac_modifier.pruning import sparsegpt
from rac_modifier.pruning.hessian import Statistics
from rac_modifier.quantization.grid import Grid
from rac_modifier.settings.entries import PruningEntry
from rac_modifier.settings.pattern import Pattern
from tests.meeting import together

ALONE = Processes()
ROWS = {"q": 24, "k": 8, "v": 8, "down": 16}
COLUMNS = 16
ENTRY = PruningEntry(mask_structure="2:4", solver="sparsegpt", reconstruct="dense", refit=False)


@pytest.fixture
def modules():
    return {name: torch.nn.Linear(COLUMNS, rows, bias=False) for name, rows in ROWS.items()}


@pytest.fixture
def batches():
    """Inputs in the pruned and in the dense model, of six batches."""
    inputs = [torch.randn(50, COLUMNS) @ torch.randn(COLUMNS, COLUMNS) for _ in range(6)]
    return [(x, x + 0.1 * torch.randn(x.shape)) for x in inputs]


def one_per_call(group):
    return 1


def groups_of(modules, batches, processes=ALONE):
    """q, k and v read one input, and down reads another. Each batch of a process is a shard."""
    groups = []
    for names, factor in ((("q", "k", "v"), 1.0), (("down",), 0.5)):
        members = [modules[name] for name in names]
        statistics = Statistics(
            COLUMNS, "cpu", [module.weight.detach() for module in members], processes
        )
        for x, dense in batches:
            statistics.add(x * factor, torch.ones(len(x)), dense * factor)
            statistics.end_shards(1)
        groups.append(InputGroup(members, statistics))
    return groups


def pruned(modules, batches, processes, slow=None):
    """What becomes of each module, by name; `slow` is busy now and then."""
    names = {module: name for name, module in modules.items()}
    patterns = dict.fromkeys(modules, Pattern.n_of_m(2, 4))
    solved = []

    def solve(some):
        if slow is not None:
            for _ in range(slow.randrange(10**5)):  # others go on meanwhile
                pass
        solved.extend(names[module] for group in some for module in group.modules)
        return solve_groups(ENTRY, some, names, patterns, NoQuantizer())

    own = batches[processes.rank :: processes.count]
    if len(own) < -(-len(batches) // processes.count):  # a shard without tokens
        own = [*own, (batches[0][0][:0], batches[0][1][:0])]
    groups = groups_of(modules, own, processes)
    found = {}
    for group, results in solve_on_all_ranks(groups, names, processes, solve, one_per_call):
        found |= zip((names[module] for module in group.modules), results, strict=True)
    return found, solved


@pytest.mark.parametrize("count", [2, 3, 4])
def test_they_end_as_one_process_on_all_tokens_bit_by_bit(modules, batches, count):
    expected, _ = pruned(modules, batches, Processes())
    ends = together(count, lambda processes: pruned(modules, batches, processes))
    assert sorted(name for _, solved in ends for name in solved) == sorted(
        modules
    )  # each in one process
    assert sum(bool(solved) for _, solved in ends) == 2  # q, k and v together
    for found, _ in ends:
        for name, one in found.items():
            assert torch.equal(one.weight, expected[name].weight)
            assert one.record == expected[name].record
            assert one.record["tokens"] == 300


def test_who_is_slow_changes_no_bit(modules, batches):
    runs = [
        together(
            3, lambda processes, seed=seed: pruned(modules, batches, processes, random.Random(seed))
        )[0][0]
        for seed in range(3)
    ]
    for run in runs[1:]:
        assert all(torch.equal(run[name].weight, one.weight) for name, one in runs[0].items())


def test_scales_masters_and_records_reach_all(modules, batches):
    names = {module: name for name, module in modules.items()}

    def made(module):
        weight = module.weight.detach()
        rounded = names[module] != "k"  # k is not rounded
        scale = torch.full((len(weight), 1), 0.5) if rounded else None
        zeros = torch.full((len(weight), 1), -3, dtype=torch.int8) if names[module] == "v" else None
        return Pruned(
            weight + 1, {"name": names[module]}, scale, zeros, weight * 2 if rounded else None
        )

    def solve(some):
        return [[made(module) for module in group.modules] for group in some]

    def run(processes):
        groups = groups_of(modules, batches, processes)
        return {
            names[module]: one
            for group, results in solve_on_all_ranks(groups, names, processes, solve, one_per_call)
            for module, one in zip(group.modules, results, strict=True)
        }

    for found in (run(Processes()), *together(2, run)):
        assert found.keys() == ROWS.keys()
        for name, one in found.items():
            weight = modules[name].weight.detach()
            assert torch.equal(one.weight, weight + 1)
            assert one.record == {"name": name}
            assert (one.scale is None, one.master is None) == (name == "k", name == "k")
            if name != "k":
                assert torch.equal(one.scale, torch.full((ROWS[name], 1), 0.5))
                assert torch.equal(one.master, weight * 2)
            assert (one.zero_point is None) == (name != "v")
            if name == "v":
                assert torch.equal(
                    one.zero_point, torch.full((ROWS[name], 1), -3, dtype=torch.int8)
                )


@pytest.mark.parametrize(("solver", "expected"), [("sparsegpt", [2, 1, 1, 2]), ("alps", [1] * 6)])
def test_small_groups_of_one_shape_that_follow_each_other_are_solved_at_once(
    monkeypatch, batches, solver, expected
):
    """At most two of 8 rows: of the first three, and of the last two. The one of 16 rows between them is alone."""
    monkeypatch.setattr(sparsegpt, "_BATCH_ON_CPU", 2 * COLUMNS * 8 + 1)
    modules = {
        str(i): torch.nn.Linear(COLUMNS, rows, bias=False)
        for i, rows in enumerate((8, 8, 8, 16, 8, 8))
    }
    names = {module: name for name, module in modules.items()}

    def made():
        groups = []
        for i, module in enumerate(modules.values()):
            groups.append(
                InputGroup([module], Statistics(COLUMNS, "cpu", [module.weight.detach()]))
            )
            for x, dense in batches:
                groups[-1].statistics.add(x * (1 + i), torch.ones(len(x)), dense)
            groups[-1].statistics.finish()
        return groups

    entry = ENTRY.model_copy(update={"solver": solver})

    def per_call(group):
        return problems_per_call(group.modules, torch.device("cpu"), entry)

    patterns, calls = dict.fromkeys(modules, Pattern.n_of_m(2, 4)), []

    def solve(some):
        calls.append(len(some))
        return solve_groups(entry, some, names, patterns, NoQuantizer())

    found = {
        names[group.modules[0]]: one
        for group, (one,) in solve_on_all_ranks(made(), names, Processes(), solve, per_call)
    }
    assert calls == expected
    if solver == "sparsegpt":  # so many at a time where that is asked for
        calls.clear()
        list(solve_on_all_ranks(made()[:3], names, Processes(), solve, one_per_call))
        assert calls == [1, 1, 1]
    for name, group in zip(modules, made(), strict=True):
        ((alone,),) = solve_groups(entry, [group], names, patterns, NoQuantizer())
        assert found[name].record["name"] == name
        assert torch.equal(found[name].weight != 0, alone.weight != 0)
        torch.testing.assert_close(found[name].weight, alone.weight)


def test_the_largest_is_solved_beside_all_others():
    assert owners([24, 16, 8, 8], 2) == [0, 1, 1, 0]
    assert owners([24], 4) == [0]


@pytest.mark.parametrize("when", ["at the end of a shard", "when they are solved"])
def test_processes_that_calibrated_other_modules_are_refused(modules, batches, when):
    names = {module: name for name, module in modules.items()}

    def step(groups, processes):
        if when == "at the end of a shard":
            end_shards(groups, names, processes, 1)
        return list(solve_on_all_ranks(groups, names, processes, lambda some: [], one_per_call))

    def run(processes):
        groups = groups_of(modules, [])[: 2 - processes.rank]
        return step(groups, processes)

    with pytest.raises(
        RacError,
        match=r"process 0 and process 1 have not calibrated the same modules \(down\): .*fewer",
    ):
        together(2, run)


def test_an_error_names_the_module(modules, batches):
    broken = [(replace_first(x), dense) for x, dense in batches]
    with pytest.raises(RacError, match="q: activations of 1 of 16 inputs are not finite"):
        pruned(modules, broken, Processes())


def replace_first(x):
    x = x.clone()
    x[0, 0] = float("inf")
    return x


class Rounding:
    """A quantizer of all modules to 4 bits in groups of 8."""

    def __init__(self, modules, symmetric=True):
        self.grids = dict.fromkeys(modules, Grid("int", 4, 8, symmetric))
        self.described = {str(i): "int4" for i in range(9)} | dict.fromkeys(ROWS, "int4")


@pytest.mark.parametrize(("solver", "symmetric"), [("alps", True), ("none", True), ("none", False)])
def test_training_starts_with_the_codes_that_are_saved(modules, batches, solver, symmetric):
    """Each master weight rounds to its code, and lies on the side of the weight that was rounded."""
    entry = PruningEntry(
        **({"solver": "none"} if solver == "none" else {"mask_structure": "2:4"}),
        quantization={
            "config_groups": {
                "w": {"weights": {"num_bits": 4, "strategy": "group", "group_size": 8}}
            }
        },
        recover={"tokens": 100},
    )
    names = {module: name for name, module in modules.items()}
    pattern = Pattern.nothing() if solver == "none" else Pattern.n_of_m(2, 4)
    for group in groups_of(modules, batches):
        of_all = dict.fromkeys(modules, pattern)
        (found,) = solve_groups(entry, [group], names, of_all, Rounding(names, symmetric))
        for one in found:
            steps = one.scale.repeat_interleave(8, dim=1)
            codes = (one.weight / steps).round()
            assert (one.zero_point is None) == symmetric
            if not symmetric:  # codes that are stored
                stored = codes + one.zero_point.repeat_interleave(8, dim=1)
                assert bool(((stored >= -8) & (stored <= 7)).all())
            assert torch.equal((one.master / steps).round(), codes)
            off = (one.master / steps - codes).abs()
            assert 0.1 < off[codes != 0].mean() < 0.45, "within the cells, and not in their middle"
            if solver == "alps":
                assert bool((one.master.unflatten(1, (-1, 4)) == 0).sum(-1).ge(2).all())
            else:
                assert (one.master != 0).float().mean() > 0.99
