"""Whole recipes against a skeleton: what could not run is refused without weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from rac_modifier.errors import RacError
from rac_modifier.llmcompressor.check_recipe import check_recipe, skeleton_of
from tests.tiny import save_tiny_experts

SPARSE = "ReasoningAwareSparseGPTModifier"
THREE = {"num_bits": 3, "strategy": "group", "group_size": 32}
WORDS = {"targets": ["Linear"], "weights": {"num_bits": 4, "strategy": "group", "group_size": 32}}


def recipe(**modifiers):
    return {"a_stage": {"a_modifiers": modifiers}}


@pytest.fixture(scope="module")
def skeleton(tiny_folder: Path):
    return skeleton_of(str(tiny_folder))


def test_an_expert_may_be_ignored_by_its_name(tmp_path):
    """A skeleton has the experts of a layer in one module, and a run splits them."""
    mixture = skeleton_of(str(save_tiny_experts(tmp_path / "experts")))
    check_recipe(recipe(**{SPARSE: {"sparsity": 0.5, "ignore": ["re:.*experts.2.*"]}}), mixture)


def test_a_skeleton_has_shapes_and_no_weights(skeleton):
    assert {parameter.device.type for parameter in skeleton.parameters()} == {"meta"}
    assert skeleton.model.layers[0].mlp.down_proj.weight.shape == (64, 128)


@pytest.mark.parametrize(
    "modifiers",
    [
        {SPARSE: {"mask_structure": "2:4", "quantization": {"config_groups": {"w": WORDS}}}},
        {SPARSE: {"solver": "none", "quantization": {"config_groups": {"w": {"weights": THREE}}}}},
        {
            "ReasoningAwareCalibrationModifier": {},
            "GPTQModifier": {"config_groups": {"w": WORDS}, "ignore": ["lm_head"]},
        },
        {
            "ReasoningAwareCalibrationModifier": {},
            "AWQModifier": {},
            "QuantizationModifier": {"config_groups": {"w": WORDS}, "ignore": ["lm_head"]},
        },
        {"QuantizationModifier": {"config_groups": {"w": WORDS}, "ignore": ["lm_head"]}},
    ],
    ids=lambda modifiers: "+".join(modifiers),
)
def test_what_fits_passes(skeleton, modifiers):
    check_recipe(recipe(**modifiers), skeleton)


@pytest.mark.parametrize(
    ("modifiers", "says"),
    [
        ({SPARSE: {"mask_structure": "3:6"}}, "q_proj"),
        ({SPARSE: {"sparsity": 0.5, "targets": ["re:none"]}}, "match no linear layer"),
        (
            {SPARSE: {"sparsity": 0.5, "ignore": ["re:.*experts.2.*"]}},
            "ignore: 're:.*experts.2.*' has no effect",
        ),
        (
            {SPARSE: {"sparsity": 0.5, "quantization": {"scheme": "W4A16"}}},
            "no multiple of the group_size 128",
        ),
        (
            {SPARSE: {"sparsity": 0.5}, "GPTQModifier": {"scheme": "W4A16"}},
            "fills pruned weights again",
        ),
        (
            {"GPTQModifier": {"scheme": "W4A16", "ignore": ["lm_head"]}},
            "no multiple of the group_size 128",
        ),
        ({"GPTQModifier": {"scheme": "W5A16"}}, "GPTQModifier"),
        (
            {"GPTQModifier": {"config_groups": {"w": {**WORDS, "targets": ["re:none"]}}}},
            "match no module",
        ),
        ({"GPTQModifier": {"shceme": "W4A16"}}, "shceme"),
        (
            {
                "GPTQModifier": {"config_groups": {"w": WORDS}},
                "ReasoningAwareCalibrationModifier": {},
            },
            "stands behind GPTQModifier, which changes the model before its traces are taken; write it first",
        ),
        ({"NoSuchModifier": {}}, "NoSuchModifier"),
        (
            {"GPTQModifier": {"config_groups": {"w": WORDS}}},
            "GPTQModifier calibrates, and nothing says on what; add ReasoningAwareCalibrationModifier: {} before it",
        ),
        (
            {
                "ReasoningAwareCalibrationModifier": {},
                "AutoRoundModifier": {
                    "config_groups": {"w": {**WORDS, "weights": {**THREE, "symmetric": False}}}
                },
            },
            "AutoRoundModifier with symmetric: false: llm-compressor 0.14 saves its weights without their zero points",
        ),
        ({}, "its recipe has no modifier"),
    ],
)
def test_what_does_not_fit_is_refused(skeleton, modifiers, says):
    with pytest.raises(RacError) as caught:
        check_recipe(recipe(**modifiers), skeleton)
    assert says in str(caught.value)
