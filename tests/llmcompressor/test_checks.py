"""What upstream's `oneshot` is given next to our recipe, and whole recipes: honoured or refused."""

import json
from dataclasses import fields
from types import SimpleNamespace

import pytest
from llmcompressor.args import DatasetArguments, RecipeArguments
from loguru import logger

from rac_modifier import RacError
from rac_modifier.llmcompressor.checks import (
    HONOURED,
    check_arguments,
    check_recipe,
    given_tokenizer,
    skeleton_of,
)
from tests.llmcompressor.modifier_helpers import gptq_w4, int4
from tests.tiny import save_tiny_experts, tiny_model

NAME = "ReasoningAwareSparseGPTModifier"
CALIBRATES = "ReasoningAwareCalibrationModifier"
OTHER = "{% for m in messages %}<user><user>{{ m.content }}{% endfor %}<assistant>"


def arguments(output_dir=None, stage=None, processor=None, recipe=None, **given):
    """What `Oneshot` holds, without loading a model."""
    return SimpleNamespace(
        dataset_args=DatasetArguments(**given),
        recipe_args=RecipeArguments(stage=stage, recipe=recipe),
        output_dir=None if output_dir is None else str(output_dir),
        processor=processor,
    )


def test_every_argument_without_effect_is_refused_by_name_with_what_to_do():
    given = arguments()
    names = {field.name for field in fields(DatasetArguments)} - HONOURED
    assert len(names) > 20
    for name in names:
        setattr(given.dataset_args, name, "a value")
    with pytest.raises(RacError) as caught:
        check_arguments(given, NAME, prunes=True)
    lines = str(caught.value).splitlines()
    assert sorted(names) == sorted(line.split()[3].partition("=")[0] for line in lines)
    assert all("argument out; data and batches are settings of the recipe" in x for x in lines)


def test_defaults_and_what_is_honoured_pass():
    honoured = {
        "pipeline": "Sequential",
        "tracing_ignore": ["f"],
        "sequential_targets": ["Qwen3DecoderLayer"],
        "sequential_targets_per_subgraph": 2,
        "sequential_offload_device": "cpu",
        "moe_calibrate_all_experts": False,
    }
    check_arguments(arguments(), NAME, prunes=True)
    check_arguments(arguments(**honoured), NAME, prunes=True)
    check_arguments(arguments(propagate_error=False, sequential_prefetch=True), NAME, prunes=False)


@pytest.mark.parametrize("pipeline", ["basic", "datafree"])
def test_pipelines_that_do_not_go_through_the_model_are_refused(pipeline):
    with pytest.raises(RacError, match=f'pipeline="{pipeline}" does not prune by layer'):
        check_arguments(arguments(pipeline=pipeline), NAME, prunes=True)


def test_an_output_folder_in_use_is_refused(tmp_path):
    (tmp_path / "killed" / ".rac_saving").mkdir(parents=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    for free in ("new", "killed"):
        check_arguments(arguments(tmp_path / free), NAME, prunes=True)
    for used, says in (("full", "full is in use"), ("full/file", "file is a file")):
        with pytest.raises(RacError, match=says):
            check_arguments(arguments(tmp_path / used), NAME, prunes=True)
    check_arguments(arguments(tmp_path, stage="second"), NAME, prunes=True)
    with pytest.raises(RacError, match="full is in use"):  # the folder of a stage
        check_arguments(arguments(tmp_path, stage="full"), NAME, prunes=True)


def test_a_stage_that_upstream_does_not_read_is_named(tmp_path):
    warnings = []
    sink = logger.add(warnings.append, format="{message}", level="WARNING")
    stage = "a_stage: {pruning_modifiers: {ReasoningAwareSparseGPTModifier: {sparsity: 0.5}}}\n"
    (tmp_path / "r.yaml").write_text(f"{stage}quant_stag: {{q_modifiers: {{GPTQModifier: {{}}}}}}")
    for recipe in (str(tmp_path / "r.yaml"), stage):
        check_arguments(arguments(recipe=recipe), NAME, prunes=True)
    logger.remove(sink)
    assert [line.partition(";")[0] for line in warnings] == [
        f"{tmp_path / 'r.yaml'}: llm-compressor would overlook quant_stag: q_modifiers"
    ]


@pytest.mark.usefixtures("nothing_is_sampled")
def test_oneshot_refuses_them_before_anything_is_sampled(prune, calibrate, tmp_path):
    given, says = {"num_calibration_samples": 8}, "num_calibration_samples=8"
    with pytest.raises(RacError, match=says):
        prune(oneshot_options=given)
    with pytest.raises(RacError, match=says):
        calibrate(later=[gptq_w4()], oneshot_options=given)


def test_the_tokenizer_of_oneshot_or_of_the_recipe_is_used():
    given = SimpleNamespace(name_or_path="given")
    assert given_tokenizer(arguments(processor=given), None, "model") is given
    for processor in (given, SimpleNamespace(tokenizer=given)):
        assert given_tokenizer(arguments(processor=processor), "given", "model") is None
        assert given_tokenizer(arguments(processor=processor), "recipes", "given") is None
    with pytest.raises(RacError, match="tokenizer 'given', and the recipe 'recipes'"):
        given_tokenizer(arguments(processor=given), "recipes", "model")


@pytest.mark.parametrize(
    "given",
    [{"sequential_targets": ["Qwen3DecoderLayer"]}, {"sequential_targets_per_subgraph": 2}],
    ids=str,
)
def test_sequential_targets_are_honoured(prune, tmp_path, given):
    prune(output_dir=tmp_path / "out", oneshot_options=given)
    order = json.loads((tmp_path / "out" / "rac_run.json").read_text())["order"]
    assert order["order"] == "layer"
    assert order["why"].startswith(f"oneshot was given {next(iter(given))}=")


# whole recipes


THREE = {"num_bits": 3, "strategy": "group", "group_size": 32}
WORDS = int4()["config_groups"]["group_0"]
FITTING = {"config_groups": {"w": WORDS}, "ignore": ["lm_head"]}


def recipe(modifiers):
    return {"a_stage": {"a_modifiers": modifiers}}


@pytest.fixture(scope="module")
def skeleton(tiny_folder):
    return skeleton_of(str(tiny_folder))


def test_an_expert_may_be_ignored_by_its_name(tmp_path):
    """A skeleton has the experts of a layer in one module, and a run splits them."""
    mixture = skeleton_of(str(save_tiny_experts(tmp_path / "experts")))
    check_recipe(recipe({NAME: {"sparsity": 0.5, "ignore": ["re:.*experts.2.*"]}}), mixture)


@pytest.mark.parametrize(
    "modifiers",
    [
        {NAME: {"mask_structure": "2:4", "quantization": {"config_groups": {"w": WORDS}}}},
        {NAME: {"solver": "none", "quantization": {"config_groups": {"w": {"weights": THREE}}}}},
        {CALIBRATES: {}, "GPTQModifier": FITTING},
        {CALIBRATES: {}, "AWQModifier": {}, "QuantizationModifier": FITTING},
        {"QuantizationModifier": FITTING},
    ],
    ids=lambda modifiers: "+".join(modifiers),
)
def test_what_fits_passes(skeleton, modifiers):
    check_recipe(recipe(modifiers), skeleton)


ZEROS = {"config_groups": {"w": {**WORDS, "weights": {**THREE, "symmetric": False}}}}
UNFIT = [
    ({NAME: {"mask_structure": "3:6"}}, "q_proj"),
    ({NAME: {"sparsity": 0.5, "targets": ["re:none"]}}, "match no linear layer"),
    ({NAME: {"sparsity": 0.5, "ignore": ["re:.*experts.2.*"]}}, "ignore: 're:.*experts.2.*'"),
    ({NAME: {"sparsity": 0.5, "quantization": {"scheme": "W4A16"}}}, "group_size 128"),
    ({NAME: {"sparsity": 0.5}, "GPTQModifier": {"scheme": "W4A16"}}, "fills pruned weights again"),
    (
        {NAME: {"sparsity": 0.5}, "REAPPruningModifier": {"sparsity": 0.5}},
        "removes its work; write it first",
    ),
    ({"GPTQModifier": {"scheme": "W4A16", "ignore": ["lm_head"]}}, "the group_size 128"),
    ({"GPTQModifier": {"scheme": "W5A16"}}, "GPTQModifier"),
    ({"GPTQModifier": {"config_groups": {"w": {**WORDS, "targets": ["re:none"]}}}}, "no module"),
    ({"GPTQModifier": {"shceme": "W4A16"}}, "shceme"),
    ({"GPTQModifier": FITTING, CALIBRATES: {}}, "is behind GPTQModifier, which changes the model"),
    ({"NoSuchModifier": {}}, "NoSuchModifier"),
    ({"GPTQModifier": FITTING}, f"nothing says on what; add {CALIBRATES}: {{}} before it"),
    ({CALIBRATES: {}, "AutoRoundModifier": ZEROS}, "saves its weights without their zero points"),
    ({}, "its recipe has no modifier"),
]


@pytest.mark.parametrize(("modifiers", "says"), UNFIT, ids=[says for _, says in UNFIT])
def test_what_does_not_fit_is_refused(skeleton, modifiers, says):
    with pytest.raises(RacError) as caught:
        check_recipe(recipe(modifiers), skeleton)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("weights", "why"),
    [
        ({"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False}, "zero points"),
        ({"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [8, 8]}, "block"),
    ],
)
def test_a_later_scheme_that_cannot_be_packed_is_refused_before_anything_is_sampled(weights, why):
    def check(targets="re:.*mlp.*", **changes):
        later = {"ignore": ["lm_head"], "config_groups": {"g": {"targets": [targets]}}}
        later["config_groups"]["g"]["weights"] = weights
        modifiers = {NAME: {"mask_structure": "2:4", **changes}, "QuantizationModifier": later}
        check_recipe(recipe(modifiers), tiny_model())

    with pytest.raises(RacError, match=rf"layers\.0\.mlp\.gate_proj is pruned .* {why}.*storage"):
        check()
    check(storage="dense")
    check(targets="re:.*self_attn.*", ignore=["re:.*self_attn.*"])
