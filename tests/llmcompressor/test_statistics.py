"""Which modules read the same input, in hooks and in a layer's pass."""

import weakref
from types import SimpleNamespace

import pytest
import torch
from llmcompressor.core import active_session
from llmcompressor.pipelines.sequential.pipeline import SequentialPipeline

from rac_modifier import RacError
from rac_modifier.calibration.calibration_set import build_calibration_set
from rac_modifier.calibration.loader import CalibrationLoader
from rac_modifier.llmcompressor import pipeline
from rac_modifier.llmcompressor.statistics import Collector, collect_layer
from rac_modifier.processes import ALONE
from tests.llmcompressor.modifier_helpers import assert_same_weights, weights


def module() -> torch.nn.Module:
    return torch.nn.Linear(4, 4)


def rows(seed: int, tokens: int = 5) -> torch.Tensor:
    return torch.randn(1, tokens, 4, generator=torch.Generator().manual_seed(seed))


ONES = torch.ones(1, 5)


@pytest.fixture
def modules():
    return {name: module() for name in ("q", "k", "o")}


@pytest.fixture
def collector(modules):
    return Collector({m: name for name, m in modules.items()}, ALONE)


def test_modules_that_get_the_same_tensor_are_one_group_with_one_hessian(collector, modules):
    for batch in range(2):
        x, other = rows(batch), rows(10 + batch)
        collector.observe(modules["q"], x, ONES, batch)
        collector.observe(modules["k"], x, ONES, batch)
        collector.observe(modules["o"], other, ONES, batch)
    pair, alone = collector.take(modules.values())
    assert (pair.modules, alone.modules) == ([modules["q"], modules["k"]], [modules["o"]])
    assert pair.statistics.hessian.tokens == alone.statistics.hessian.tokens == 10
    x = torch.cat([rows(0), rows(1)]).flatten(0, 1).double()
    torch.testing.assert_close(
        pair.statistics.hessian.matrix().double(), 2 / 10 * x.T @ x, rtol=1e-5, atol=1e-5
    )
    assert pair.statistics.cross_moment() is None


def test_equal_values_in_another_tensor_are_another_group(collector, modules):
    x = rows(0)
    collector.observe(modules["q"], x, ONES, 0)
    collector.observe(modules["k"], x.clone(), ONES, 0)
    assert [len(group.modules) for group in collector.take(modules.values())] == [1, 1]


def test_a_module_that_first_runs_in_a_later_batch_joins_no_older_group(collector, modules):
    collector.observe(modules["q"], rows(0), ONES, 0)
    x = rows(1)
    collector.observe(modules["q"], x, ONES, 1)
    collector.observe(modules["k"], x, ONES, 1)
    first, second = collector.take(modules.values())
    assert (first.statistics.hessian.tokens, second.statistics.hessian.tokens) == (10, 5)


def test_a_group_that_no_longer_reads_one_tensor_is_an_error(collector, modules):
    x = rows(0)
    collector.observe(modules["q"], x, ONES, 0)
    collector.observe(modules["k"], x, ONES, 0)
    collector.observe(modules["q"], rows(1), ONES, 1)
    with pytest.raises(RacError, match="k no longer reads the same input as q"):
        collector.observe(modules["k"], rows(1), ONES, 1)


def test_a_module_that_gets_only_some_tokens_is_an_error(collector, modules):
    with pytest.raises(
        RacError, match=r"q got 3 of the 5 tokens of the batch.*moe_calibrate_all_experts=True"
    ):
        collector.observe(modules["q"], rows(0, tokens=3), ONES, 0)


def test_groups_are_taken_once_and_only_those_asked_for(collector, modules):
    for name in ("q", "o"):
        collector.observe(modules[name], rows(0), ONES, 0)
    (group,) = collector.take([modules["o"], module()])
    assert group.modules == [modules["o"]]
    assert collector.take([modules["o"]]) == []
    assert len(collector.take([modules["q"]])) == 1


def upstreams_loop(model, ours, run, dataset_args):
    """Prune by hooks while upstream's own loop runs the model."""
    run.use_order("layer", "upstream's loop")
    run.by_hooks = True
    with pipeline._in_session(active_session(), ours.loader.unpadded()) as unpadded:
        SequentialPipeline.__call__(model, unpadded, dataset_args)


@pytest.mark.parametrize("solver", ["sparsegpt", "magnitude"])
def test_a_layers_pass_prunes_as_upstreams_loop_does(prune, monkeypatch, solver):
    """Both on one sequence per batch, so that the sums are over the same terms in the same order."""
    original = CalibrationLoader._grouped
    monkeypatch.setattr(CalibrationLoader, "_grouped", lambda self, batch_tokens: original(self, 0))
    lean = weights(prune(preset="paper", solver=solver))
    monkeypatch.setattr(pipeline, "_prune", upstreams_loop)
    assert_same_weights(lean, weights(prune(preset="paper", solver=solver)))


def test_padded_batches_give_the_hessians_of_unpadded_ones(prune, monkeypatch):
    hessians, take = [], Collector.take

    def spy(self, modules):
        groups = take(self, modules)
        hessians.extend(group.statistics.hessian.matrix() for group in groups)
        return groups

    monkeypatch.setattr(Collector, "take", spy)
    settings = {"preset": "paper", "solver": "magnitude"}  # lets no difference grow between layers
    prune(**settings)
    padded, hessians = hessians, []
    monkeypatch.setattr(pipeline, "_prune", upstreams_loop)
    prune(**settings)
    assert len(padded) == len(hessians) == 8  # 4 per layer: q/k/v and gate/up share theirs
    for ours, upstream in zip(padded, hessians, strict=True):
        torch.testing.assert_close(ours, upstream, rtol=1e-3, atol=1e-4)


def test_a_pass_ends_at_its_last_module_from_the_second_batch_on(prune, monkeypatch, dense):
    """Both layers' down_proj, the last module of each, end in the first batch, and to propagate layer 0."""
    calls, loaders = [], []

    def build(*args, **kwargs):
        made = build_calibration_set(*args, **kwargs)
        loaders.append(made.loader)
        calls.clear()  # of sampling
        return made

    name = "rac_modifier.llmcompressor.calibration_modifier.build_calibration_set"
    monkeypatch.setattr(name, build)
    for layer in dense.model.layers:
        layer.mlp.down_proj.register_forward_hook(lambda module, args, output: calls.append(module))
    prune(model=dense, preset="paper")
    assert len(loaders[0]) > 3
    assert len(calls) == 2 + len(loaders[0])


def test_a_stopped_pass_leaves_no_activations_behind(prune, monkeypatch):
    """Without the garbage collector's help they stay alive in a cycle through the frames of the exception."""
    alive, seen = [], []
    original = Collector.observe

    def observe(self, module, x, weights, batch):
        if module.weight.shape == (64, 128) and batch > 1:  # down_proj, where passes are stopped
            alive.append(sum(reference() is not None for reference in seen[:-1]))
            seen.append(weakref.ref(x))
        return original(self, module, x, weights, batch)

    monkeypatch.setattr(Collector, "observe", observe)
    prune(preset="paper", calibration={"tokens": 1500, "batch_tokens": 128})
    assert len(alive) > 10
    assert max(alive) <= 1


class TwiceModel(torch.nn.Module):
    """Calls `first` twice and `last` once, or `last` in some batches only."""

    def __init__(self, calls):
        super().__init__()
        self.first, self.last, self.calls = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), calls
        self.ends = 0

    def forward(self, x):
        for name in self.calls:
            x = getattr(self, name)(x)
        self.ends += 1


@pytest.mark.parametrize(
    ("calls", "ends"), [(("first", "last"), 1), (("first", "last", "first"), 3)]
)
def test_no_pass_is_ended_where_a_module_is_called_twice(calls, ends):
    model = TwiceModel(calls)
    stage = SimpleNamespace(
        modules=[model.first, model.last], look=lambda model, cache, batch: model(rows(batch))
    )
    names = {model.first: "first", model.last: "last"}
    groups = collect_layer(stage, model, None, Batches([ONES] * 3), names, ALONE)
    assert model.ends == ends
    assert [g.statistics.hessian.tokens for g in groups] == [15 * calls.count("first"), 15]


class Batches(list):
    """A loader of batches with these weights, each a shard."""

    @property
    def token_weights(self):
        return self

    @property
    def shards_ended(self):
        return [1] * len(self)
