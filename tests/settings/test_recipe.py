import json
from pathlib import Path

import jsonschema
import pytest
import torch
import yaml
from llmcompressor import oneshot

from rac_modifier.checkpoint.hf_quantizer import load_model
from rac_modifier.checkpoint.inspect import inspect_checkpoint
from rac_modifier.errors import RacError
from rac_modifier.llmcompressor.modifiers import MODIFIERS
from rac_modifier.settings.recipe import check_entry, find_entry, find_named_entry, load_recipe, schema
from tests.tiny import NAME, entry, is_2of4, linears, recipe, save_tiny

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
SMALL = ["calibration.tokens=400", "traces.sampling.max_new_tokens=20", "traces.sampling.temperature=1.0"]


def is_offline(path: Path) -> bool:
    problems = find_entry(yaml.safe_load(path.read_text()), path.name)["traces"]["problems"]
    return problems["source"] == "arithmetic" or problems["source"].startswith("reasoning-gym:")


@pytest.fixture(scope="session")
def wide_folder(tmp_path_factory):
    """A tiny model whose inputs are multiples of 128, the group size of W4A16."""
    wide = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 8, "num_key_value_heads": 8}
    return save_tiny(tmp_path_factory.mktemp("wide") / "model", **wide)


def test_there_are_recipes_for_every_setting_of_the_readme():
    assert len(RECIPES) >= 5
    assert sum(map(is_offline, RECIPES)) >= 3


@pytest.mark.parametrize(("file", "name"), zip(("recipe", "calibration"), MODIFIERS, strict=True))
def test_the_published_schemas_are_the_modifiers(file, name):
    """If this fails: make schema."""
    assert (ROOT / "docs" / f"{file}.schema.json").read_text() == schema(name)


def test_the_schema_is_a_json_schema_that_knows_no_other_keys():
    parsed = json.loads(schema())
    jsonschema.Draft202012Validator.check_schema(parsed)
    validator = jsonschema.Draft202012Validator(parsed)
    validator.validate(entry())
    for wrong in ({"sparsty": 0.5}, {"traces": {"stor": "x"}}, {"calibration": {"tokens": "many"}}, {"solver": "x"}):
        with pytest.raises(jsonschema.ValidationError):
            validator.validate(wrong)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_shipped_recipe_is_valid(path):
    name, settings = find_named_entry(load_recipe(path), str(path))
    jsonschema.validate(settings, json.loads(schema(name)))
    mixture = check_entry(settings, str(path), name).calibration.mixture
    assert next(iter(mixture)) == "traces"
    assert (mixture == {"traces": 1.0}) is ("mixture" not in path.stem)


@pytest.mark.parametrize("path", [p for p in RECIPES if is_offline(p)], ids=lambda p: p.stem)
def test_a_shipped_recipe_runs_without_download(path, wide_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where relative stores go
    content = load_recipe(path, SMALL)
    out = tmp_path / "out"
    model = oneshot(model=str(wide_folder), recipe=yaml.safe_dump(content, sort_keys=False), output_dir=str(out))
    report = inspect_checkpoint(out)
    assert report.sound
    described = "".join(scheme.describe() for scheme in report.quantization)
    for scheme in ("fp8", "w8", "w4a16"):
        assert (scheme in path.stem) == ({"fp8": "float8", "w8": "int8", "w4a16": "int4"}[scheme] in described)
    pruned = "gptq" not in path.stem
    assert len(report.sparse) == (14 if pruned else 0)
    assert all(
        row.sparsity == pytest.approx(0.5, abs=0.05) for row in report.sparse
    )  # small weights round to 0 as well
    assert all(row.structure == ("2:4" if "2of4" in path.stem else "unstructured") for row in report.sparse)
    loaded = load_model(out)
    ids = torch.arange(2, 40).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
    for name, module in linears(loaded).items():  # the forward pass decompressed them
        assert not pruned or "2of4" not in path.stem or is_2of4(module.weight), name


def test_overrides_reach_any_depth_and_leave_the_rest(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(recipe(entry(), QuantizationModifier={"scheme": "FP8_DYNAMIC", "targets": ["Linear"]}))
    overrides = ["calibration.tokens=7", "traces.store=a.jsonl", "ignore=[x, 're:y.*']", "sparsity=null"]
    content = load_recipe(path, overrides)
    settings = find_entry(content, "r")
    assert settings["calibration"] == {**entry()["calibration"], "tokens": 7}
    assert settings["traces"]["store"] == "a.jsonl"
    assert settings["traces"]["sampling"]["max_new_tokens"] == 40
    assert settings["ignore"] == ["x", "re:y.*"]
    assert settings["sparsity"] is None
    assert content["quant_stage"]["quant_modifiers"]["QuantizationModifier"]["scheme"] == "FP8_DYNAMIC"


def test_a_group_that_the_recipe_lacks_can_be_set(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(recipe({"sparsity": 0.5}))
    assert find_entry(load_recipe(path, ["calibration.generic.column=text"]), "r")["calibration"] == {
        "generic": {"column": "text"}
    }


def test_every_mistake_is_in_one_message():
    with pytest.raises(RacError) as caught:
        check_entry({"sparsty": 0.5, "solver": "admm", "calibration": {"tokens": 0}}, "r.yaml")
    for part in ("r.yaml", "sparsty: there is no such setting", "solver: ", "'admm'", "calibration.tokens: "):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        f"pruning: {{pruning_modifiers: {{{NAME}: {{sparsity: 0.5}}}}}}",
        f"pruning_stage: {{pruning: {{{NAME}: {{sparsity: 0.5}}}}}}",
        f"pruning_stage: {{1: {{{NAME}: {{sparsity: 0.5}}}}}}",
        f"pruning_modifiers: {{{NAME}: {{sparsity: 0.5}}}}",
        f"{NAME}: {{sparsity: 0.5}}",
        f"pruning_stage: {{pruning_modifiers: [{NAME}]}}",
        f"pruning_stage: {{pruning_modifiers: {{{NAME}: [0.5]}}}}",
        "- a list",
        "",
    ],
)
def test_a_layout_in_which_llm_compressor_finds_nothing_is_refused(text, tmp_path):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(RacError, match="write it as pruning_stage: pruning_modifiers: "):
        load_recipe(tmp_path / "r.yaml")


def test_an_entry_without_settings_is_read_as_empty(tmp_path):
    (tmp_path / "r.yaml").write_text(f"pruning_stage: {{pruning_modifiers: {{{NAME}: }}}}")
    assert find_entry(load_recipe(tmp_path / "r.yaml", ["sparsity=0.5"]), "r") == {"sparsity": 0.5}
