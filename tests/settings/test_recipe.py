import contextlib
import copy
import json
import random
from pathlib import Path

import jsonschema
import pytest
import yaml

from rac_modifier.errors import RacError
from rac_modifier.settings.entries import ENTRIES
from rac_modifier.settings.recipe import CheckedRecipe, schema
from tests.tiny import NAME, entry, recipe

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def test_the_published_schemas_are_the_entries():
    """If this fails: make schema."""
    for file, name in zip(("recipe", "calibration"), ENTRIES, strict=True):
        assert (ROOT / "docs" / f"{file}.schema.json").read_text() == schema(name)


def test_the_schema_is_a_json_schema_that_knows_no_other_keys():
    parsed = json.loads(schema())
    jsonschema.Draft202012Validator.check_schema(parsed)
    validator = jsonschema.Draft202012Validator(parsed)
    validator.validate(entry())
    for wrong in (
        {"sparsty": 0.5}, {"traces": {"stor": "x"}}, {"calibration": {"tokens": "many"}},
        {"solver": "x"},
    ):  # fmt: skip
        with pytest.raises(jsonschema.ValidationError):
            validator.validate(wrong)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_shipped_recipe_is_valid(path):
    loaded = CheckedRecipe.load(path)
    name, settings = loaded.entry
    jsonschema.validate(settings, json.loads(schema(name)))
    assert loaded.check().calibration.mixture == {"traces": 1.0}


def test_overrides_reach_any_depth_and_leave_the_rest(tmp_path):
    path = tmp_path / "r.yaml"
    later = {"scheme": "FP8_DYNAMIC", "targets": ["Linear"]}
    path.write_text(recipe(entry(), QuantizationModifier=later))
    overrides = [
        "calibration.tokens=7", "traces.store=a.jsonl", "ignore=[x, 're:y.*']",
        "traces.sampling.batch_size=null",
        "sparsity=null",
    ]  # fmt: skip
    loaded = CheckedRecipe.load(path, [*overrides, "QuantizationModifier.targets=[x]"])
    _, settings = loaded.entry
    assert settings["calibration"] == {**entry()["calibration"], "tokens": 7}
    assert settings["traces"]["store"] == "a.jsonl"
    assert settings["traces"]["sampling"]["max_new_tokens"] == 40
    assert settings["ignore"] == ["x", "re:y.*"]
    assert "batch_size" not in settings["traces"]["sampling"]  # null takes a setting out
    assert "sparsity" not in settings
    changed = {**later, "targets": ["x"]}
    assert dict(loaded.modifiers)["QuantizationModifier"] == changed


def test_patterns_need_no_quotes_and_missing_groups_can_be_set(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(recipe({"sparsity": 0.5}))
    overrides = ["mask_structure=1:4", "sparsity=null", "calibration.seed=4", "traces.store=s"]
    _, settings = CheckedRecipe.load(path, overrides).entry
    groups = {"calibration": {"seed": 4}, "traces": {"store": "s"}}
    assert settings == {"mask_structure": "1:4", **groups}


@pytest.mark.parametrize(
    "text",
    [
        f"pruning: {{pruning_modifiers: {{{NAME}: {{sparsity: 0.5}}}}}}",
        f"pruning_stage: {{pruning: {{{NAME}: {{sparsity: 0.5}}}}}}",
        f"{NAME}: {{sparsity: 0.5}}",
        f"pruning_stage: {{pruning_modifiers: [{NAME}]}}",
        "- a list",
        "",
    ],
)
def test_a_layout_in_which_llm_compressor_finds_nothing_is_refused(text, tmp_path):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(RacError, match="write it as pruning_stage: pruning_modifiers: "):
        CheckedRecipe.load(tmp_path / "r.yaml")


@pytest.mark.parametrize(
    ("later", "says"),
    [
        ("q_stag: {q_modifiers: {GPTQModifier: {}}}", "overlook q_stag: q_modifiers; write it"),
        ("q_stage: {q_modifiers: {}}", "overlook q_stage: q_modifiers; write it as"),
        ("q_stage: {q_modifiers: {GTPQModifier: {}}}", "no modifier 'GTPQModifier'.*mean GPTQ"),
        ("q_stage: {q_modifiers: {GPTQModifier: W4A16}}", "holds 'W4A16', not settings"),
    ],
)
def test_what_llm_compressor_would_not_run_is_refused(tmp_path, later, says):
    path = tmp_path / "r.yaml"
    path.write_text(recipe({"sparsity": 0.5}) + f"\n{later}\n")
    with pytest.raises(RacError, match=says):
        CheckedRecipe.load(path)
    path.write_text(recipe({"sparsity": 0.5}) + "\nq_stage: {q_modifiers: {SmoothQuantModifier: }}")
    assert CheckedRecipe.load(path).modifiers[1] == ("SmoothQuantModifier", {})


VALUES = [
    None, 0, -1, 2**62, 1e308, float("inf"), float("nan"), "", "re:(", "re:(a+)+$", "x" * 3000,
    "a\x1b[2J", "\r\n", [], [[]], {},
    {1: 2}, {"a": {"b": [1]}}, True, "2:4", [None], 1e30, "prompts:x@nan",
    {"g": {"weights": {"num_bits": 10**18}}},
    {"g": {"weights": {"group_size": "x"}}}, {"g": None}, {"W4A16": 3}, "http://a\r\nb",
    "/dev/zero", ".",
]  # fmt: skip


def places(node):
    """Every mapping or list of a document with every key."""
    keys = node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
    for key in list(keys):
        yield node, key
        yield from places(node[key])


def test_a_mutated_recipe_is_refused_with_an_error_of_ours(tmp_path):
    path, rng, accepted = tmp_path / "r.yaml", random.Random(0), 0
    for _ in range(300):
        content = yaml.safe_load(rng.choice(RECIPES).read_text())
        for node, key in rng.sample(list(places(content)), rng.choice((1, 2))):
            node[key] = copy.deepcopy(rng.choice(VALUES))
        path.write_text(yaml.safe_dump(content, allow_unicode=True))
        with contextlib.suppress(RacError):
            CheckedRecipe.load(path)
            accepted += 1
    assert 0 < accepted < 150
