"""Layer by layer: the same as upstream's loop, with less work."""

import weakref

import pytest
import torch
from llmcompressor.pipelines.sequential.pipeline import SequentialPipeline

from rac_modifier.calibration.calibration_set import build_calibration_set
from rac_modifier.calibration.loader import CalibrationLoader
from rac_modifier.llmcompressor import pipeline
from rac_modifier.llmcompressor.input_groups import HessianCollector
from tests.llmcompressor.modifier_helpers import assert_same_weights, weights


def upstreams_loop(model, loader, pruner, dataset_args, session, device):
    with pipeline._in_session(session, loader.unpadded()) as unpadded:
        SequentialPipeline.__call__(model, unpadded, dataset_args)


@pytest.mark.parametrize("solver", ["sparsegpt", "magnitude"])
def test_the_lean_loop_prunes_as_upstreams_loop_does(prune, monkeypatch, solver):
    """Both on one sequence per batch, so that the sums are over the same products in the same order."""
    original = CalibrationLoader._grouped
    monkeypatch.setattr(CalibrationLoader, "_grouped", lambda self, batch_tokens: original(self, 0))
    lean = weights(prune(preset="paper", solver=solver))
    monkeypatch.setattr(pipeline, "calibrate_by_layer", upstreams_loop)
    assert_same_weights(lean, weights(prune(preset="paper", solver=solver)))


def test_the_lean_loop_on_padded_batches_gives_the_same_hessians(prune, monkeypatch):
    hessians = []

    class Spy(HessianCollector):
        def take(self, modules):
            groups = super().take(modules)
            hessians.extend(g.statistics.hessian.matrix() for g in groups)
            return groups

    monkeypatch.setattr("rac_modifier.llmcompressor.pruning_modifier.HessianCollector", Spy)
    prune(
        preset="paper", solver="magnitude"
    )  # which does not let a difference grow from layer to layer
    padded, hessians = hessians, []
    monkeypatch.setattr(pipeline, "calibrate_by_layer", upstreams_loop)
    prune(preset="paper", solver="magnitude")
    assert len(padded) == len(hessians) == 8  # 4 per layer: q/k/v and gate/up share theirs
    for ours, upstream in zip(padded, hessians, strict=True):
        torch.testing.assert_close(ours, upstream, rtol=1e-3, atol=1e-4)


def test_the_lean_loop_saves_work(prune, monkeypatch, dense):
    """Of both layers' down_proj, the last module of each: run to its end in the first batch, and to propagate layer 0."""
    calls, loaders = [], []

    def build(*args, **kwargs):
        made = build_calibration_set(*args, **kwargs)
        loaders.append(made.loader)
        calls.clear()  # of sampling
        return made

    monkeypatch.setattr(
        "rac_modifier.llmcompressor.calibrating_modifier.build_calibration_set", build
    )
    for layer in dense.model.layers:
        layer.mlp.down_proj.register_forward_hook(lambda module, args, output: calls.append(module))
    prune(model=dense, preset="paper")
    assert len(loaders[0]) > 3
    assert len(calls) == 2 + len(loaders[0])


def test_a_stopped_forward_leaves_no_activations_behind(prune, monkeypatch):
    """Without the garbage collector's help they stay alive in a cycle through the frames of the exception."""
    alive, seen = [], []
    original = HessianCollector.observe

    def observe(self, module, x, weights, batch):
        if (
            module.weight.shape == (64, 128) and batch > 1
        ):  # down_proj, where forward passes are stopped
            alive.append(sum(reference() is not None for reference in seen[:-1]))
            seen.append(weakref.ref(x))
        return original(self, module, x, weights, batch)

    monkeypatch.setattr(HessianCollector, "observe", observe)
    prune(preset="paper", calibration={"tokens": 1500, "batch_tokens": 128})
    assert len(alive) > 10
    assert max(alive) <= 1
