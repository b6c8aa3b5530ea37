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

from rac_modifier.calibration.loader import CalibrationLoader
from rac_modifier.llmcompressor import pipeline as seam
from tests.llmcompressor.modifier_helpers import assert_same_weights, generic_loader, gptq_w4, weights
from tests.tiny import is_2of4

ORDINARY = {
    "sparsegpt": lambda: SparseGPTModifier(sparsity=0.5, mask_structure="2:4", targets=["Linear"], ignore=["lm_head"]),
    "gptq": gptq_w4,
    "rtn": lambda: QuantizationModifier(targets=["Linear"], ignore=["lm_head"], scheme="FP8_DYNAMIC"),
    "calibrated rtn": lambda: QuantizationModifier(targets=["Linear"], ignore=["lm_head"], scheme="W8A8"),
}


@pytest.mark.parametrize("name", ORDINARY)
@pytest.mark.parametrize("pipeline", ["independent", "sequential", "basic"])
def test_recipes_without_us_give_the_same_bits_with_and_without_our_pipelines(tiny_folder, monkeypatch, name, pipeline):
    def run():
        torch.manual_seed(0)
        model = oneshot(
            model=str(tiny_folder), recipe=ORDINARY[name](), dataset=generic_loader(), pipeline=pipeline,
            num_calibration_samples=6,
        )  # fmt: skip
        return weights(model)

    assert type(CalibrationPipeline.from_modifiers([ORDINARY["gptq"]()])) is seam.ReasoningAwareSequentialPipeline
    with_ours = run()
    monkeypatch.setitem(_REGISTRY[CalibrationPipeline], "sequential", SequentialPipeline)
    monkeypatch.setitem(_REGISTRY[CalibrationPipeline], "basic", BasicPipeline)
    assert_same_weights(with_ours, run())


def test_an_ordinary_recipe_after_ours_is_not_fed_our_loader(prune, tiny_folder):
    prune()
    run = oneshot(model=str(tiny_folder), recipe=ORDINARY["sparsegpt"](), dataset=generic_loader(),
                  num_calibration_samples=6)  # fmt: skip
    assert active_session().state.data.calib is not None
    assert not isinstance(active_session().state.data.calib, CalibrationLoader)
    assert is_2of4(run.model.layers[0].mlp.up_proj.weight)
