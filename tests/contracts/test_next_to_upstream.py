"""Other recipes in the same process run upstream's own pipelines, also after a run of ours."""

import pytest
import torch
from compressed_tensors.registry.registry import _REGISTRY
from llmcompressor import oneshot
from llmcompressor.core import active_session
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.pipelines.basic.pipeline import BasicPipeline
from llmcompressor.pipelines.registry import CalibrationPipeline
from llmcompressor.pipelines.sequential.pipeline import SequentialPipeline

from rac_modifier import ReasoningAwareSparseGPTModifier
from rac_modifier.llmcompressor.pipeline import ReasoningAwareSequentialPipeline
from tests.llmcompressor.modifier_helpers import (
    assert_same_weights,
    generic_loader,
    gptq_w4,
    upstreams_sparsegpt,
    weights,
)
from tests.tiny import entry

ORDINARY = {
    "sequential": upstreams_sparsegpt,
    "independent": gptq_w4,
    "basic": lambda: QuantizationModifier(targets=["Linear"], ignore=["lm_head"], scheme="W8A8"),
}


@pytest.fixture
def loaders(monkeypatch):
    """The loaders that upstream's own loop was given."""
    seen, original = [], SequentialPipeline.__call__

    def spy(model, dataloader, dataset_args):
        seen.append(type(dataloader))
        return original(model, dataloader, dataset_args)

    monkeypatch.setattr(SequentialPipeline, "__call__", staticmethod(spy))
    return seen


def test_upstreams_recipes_give_the_same_bits_before_and_after_ours(
    tiny_folder, trace_store, monkeypatch, loaders
):
    """After a run that ended, one that failed in our loop, and one that failed outside of it."""

    def upstreams():
        loaders.clear()
        models = []
        for pipeline, make in ORDINARY.items():
            torch.manual_seed(0)
            options = {"dataset": generic_loader(), "pipeline": pipeline}
            models.append(weights(oneshot(model=str(tiny_folder), recipe=make(), **options)))
            assert _REGISTRY[CalibrationPipeline]["sequential"] is SequentialPipeline
            assert _REGISTRY[CalibrationPipeline]["basic"] is BasicPipeline
            assert type(CalibrationPipeline.from_modifiers([gptq_w4()])) is SequentialPipeline
        assert loaders == [torch.utils.data.DataLoader] * 2
        assert type(active_session().state.data.calib) is torch.utils.data.DataLoader
        return models

    def ours(*later):
        settings = entry(trace_store, preset="paper")
        recipe = [ReasoningAwareSparseGPTModifier(**settings), *later]
        return oneshot(model=str(tiny_folder), recipe=recipe)

    def fails(*args, **kwargs):
        made = CalibrationPipeline.from_modifiers([gptq_w4()])
        assert type(made) is ReasoningAwareSequentialPipeline
        raise RuntimeError("no memory left")

    def failed(where, *later):
        with monkeypatch.context() as patch:
            patch.setattr(where, fails)
            with pytest.raises(RuntimeError, match="no memory left"):
                ours(*later)

    expected = upstreams()
    initialize = "llmcompressor.modifiers.quantization.QuantizationModifier.on_initialize"
    for run in (
        ours,
        lambda: failed("rac_modifier.llmcompressor.pipeline.run_stages"),
        lambda: failed(initialize, ORDINARY["basic"]()),
    ):
        run()
        for first, second in zip(expected, upstreams(), strict=True):
            assert_same_weights(first, second)
