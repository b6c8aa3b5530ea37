"""Other recipes in the same process run upstream's own pipelines: before a run of ours, after it, and after one that failed."""

import pytest
import torch
from compressed_tensors.registry.registry import _REGISTRY
from llmcompressor import oneshot
from llmcompressor.core import active_session
from llmcompressor.modifiers.pruning import SparseGPTModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.pipelines.basic.pipeline import BasicPipeline
from llmcompressor.pipelines.registry import CalibrationPipeline
from llmcompressor.pipelines.sequential.pipeline import SequentialPipeline

from rac_modifier import ReasoningAwareSparseGPTModifier
from rac_modifier.calibration.loader import CalibrationLoader
from rac_modifier.llmcompressor.pipeline import ReasoningAwareSequentialPipeline
from tests.llmcompressor.modifier_helpers import (
    assert_same_weights,
    generic_loader,
    gptq_w4,
    weights,
)
from tests.tiny import entry, is_2of4

ORDINARY = {
    "sparsegpt": lambda: SparseGPTModifier(
        sparsity=0.5, mask_structure="2:4", targets=["Linear"], ignore=["lm_head"]
    ),
    "gptq": gptq_w4,
    "calibrated rtn": lambda: QuantizationModifier(
        targets=["Linear"], ignore=["lm_head"], scheme="W8A8"
    ),
}


def assert_upstreams_own() -> None:
    """The registry is as upstream filled it."""
    assert _REGISTRY[CalibrationPipeline]["sequential"] is SequentialPipeline
    assert _REGISTRY[CalibrationPipeline]["basic"] is BasicPipeline
    assert type(CalibrationPipeline.from_modifiers([gptq_w4()])) is SequentialPipeline


@pytest.fixture
def ours(tiny_folder, trace_store):
    """A run of ours."""

    def run():
        return oneshot(
            model=str(tiny_folder), recipe=ReasoningAwareSparseGPTModifier(**entry(trace_store))
        )

    return run


@pytest.fixture
def failed_run(ours, monkeypatch):
    """A run of ours that fails inside its pipeline."""

    def run():
        def fails(*args, **kwargs):
            assert (
                type(CalibrationPipeline.from_modifiers([gptq_w4()]))
                is ReasoningAwareSequentialPipeline
            )
            raise RuntimeError("no memory left")

        with monkeypatch.context() as patch:
            patch.setattr("rac_modifier.llmcompressor.pipeline.run_plan", fails)
            with pytest.raises(RuntimeError, match="no memory left"):
                ours()

    return run


@pytest.mark.parametrize("pipeline", ["independent", "sequential", "basic"])
@pytest.mark.parametrize("name", ORDINARY)
def test_upstreams_recipe_gives_the_same_bits_before_and_after_ours(
    tiny_folder, ours, failed_run, name, pipeline
):
    calls = []

    def run():
        assert_upstreams_own()
        torch.manual_seed(0)
        model = oneshot(
            model=str(tiny_folder),
            recipe=ORDINARY[name](),
            dataset=generic_loader(),
            pipeline=pipeline,
        )
        calls.append(weights(model))

    run()
    ours()
    run()
    failed_run()
    run()
    assert_same_weights(calls[0], calls[1])
    assert_same_weights(calls[0], calls[2])


def test_an_upstream_recipe_runs_in_upstreams_own_loop(tiny_folder, ours, failed_run, monkeypatch):
    seen = []
    original = SequentialPipeline.__call__

    def spy(model, dataloader, dataset_args):
        seen.append(type(dataloader))
        return original(model, dataloader, dataset_args)

    monkeypatch.setattr(SequentialPipeline, "__call__", staticmethod(spy))
    for before in (lambda: None, ours, failed_run):
        before()
        seen.clear()
        oneshot(model=str(tiny_folder), recipe=ORDINARY["sparsegpt"](), dataset=generic_loader())
        assert seen == [torch.utils.data.DataLoader]


def test_after_a_later_modifier_failed_the_next_oneshot_clears_ours(
    tiny_folder, trace_store, monkeypatch
):
    """Where the error is raised outside our pipeline, upstream's session reset finalizes our modifier."""
    quantize = QuantizationModifier(targets=["Linear"], ignore=["lm_head"], scheme="FP8_DYNAMIC")
    with monkeypatch.context() as patch:

        def fails(*args, **kwargs):
            raise RuntimeError("no such scheme")

        patch.setattr(QuantizationModifier, "on_initialize", fails)
        with pytest.raises(RuntimeError, match="no such scheme"):
            oneshot(
                model=str(tiny_folder),
                recipe=[ReasoningAwareSparseGPTModifier(**entry(trace_store)), quantize],
            )
    model = oneshot(
        model=str(tiny_folder), recipe=ORDINARY["sparsegpt"](), dataset=generic_loader()
    )
    assert is_2of4(model.model.layers[0].mlp.up_proj.weight)
    assert_upstreams_own()


def test_an_ordinary_recipe_after_ours_does_not_get_our_loader(ours, tiny_folder):
    ours()
    model = oneshot(
        model=str(tiny_folder), recipe=ORDINARY["sparsegpt"](), dataset=generic_loader()
    )
    assert active_session().state.data.calib is not None
    assert not isinstance(active_session().state.data.calib, CalibrationLoader)
    assert is_2of4(model.model.layers[0].mlp.up_proj.weight)
