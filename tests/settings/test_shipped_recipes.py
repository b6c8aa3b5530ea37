"""Recipes that are named without a path; tests/settings/test_recipes_run.py runs them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import rac_modifier
from rac_modifier.errors import RacError
from rac_modifier.settings.shipped_recipes import find_recipe, recipe, recipe_names, summary

FOLDER = Path(__file__).parents[2] / "rac_modifier" / "recipes"
FILES = sorted(FOLDER.iterdir())


def test_every_file_of_the_folder_is_a_recipe():
    assert recipe_names() == [path.name.removesuffix(".yaml") for path in FILES]
    assert {"rac_2of4", "rac_unstructured_50", "rac_gptq_w4a16"} <= set(recipe_names())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_shipped_recipe_is_found_by_its_name_and_by_its_path(path):
    assert recipe(path.stem) == str(path)
    assert find_recipe(path.stem) == path
    assert find_recipe(path) == path
    assert yaml.safe_load(Path(recipe(path.stem)).read_text())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_first_comment_is_a_sentence_that_fits_a_line(path):
    first = path.read_text().splitlines()[0]
    assert first == f"# {summary(path.stem)}"
    assert first.endswith(".")
    assert 40 < len(first) < 125


def test_recipes_can_be_told_apart_by_their_summaries():
    assert len({summary(name) for name in recipe_names()}) == len(FILES)


@pytest.mark.parametrize("function", [recipe, find_recipe])
@pytest.mark.parametrize(
    ("name", "close"),
    [
        ("rac_2of5", "rac_2of4"),
        ("2of4_w8", "rac_2of4_w8"),
        ("rac_unstructured50", "rac_unstructured_50"),
    ],
)
def test_an_unknown_name_is_refused_with_names_that_are_close(
    function, name, close, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RacError, match=rf"{name}.*did you mean .*\b{close}\b.*`rac recipes`"):
        function(name)


@pytest.mark.parametrize("function", [recipe, find_recipe])
def test_a_name_like_no_other_has_no_suggestion(function):
    with pytest.raises(
        RacError, match=r"zzz'?; name a YAML file, or one of the recipes that `rac recipes` lists"
    ):
        function("zzz")


def test_the_old_path_of_a_recipe_leads_to_its_name():
    with pytest.raises(
        RacError, match=r"no recipe at recipes/rac_2of4\.yaml; did you mean rac_2of4"
    ):
        find_recipe("recipes/rac_2of4.yaml")


@pytest.mark.parametrize("name", ["../rac_2of4", "rac_2of4.yaml", "", "."])
def test_the_public_function_takes_names_only(name):
    with pytest.raises(RacError, match="no recipe is named"):
        recipe(name)


def test_a_file_of_the_user_comes_before_a_shipped_recipe_and_a_folder_does_not(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rac_2of4").mkdir()  # such as the output of an earlier run
    assert find_recipe("rac_2of4") == FOLDER / "rac_2of4.yaml"
    (tmp_path / "rac_2of4_w8").write_text("mine")
    assert find_recipe("rac_2of4_w8").read_text() == "mine"


def test_the_public_function_is_light():
    code = "import sys, rac_modifier; rac_modifier.recipe('rac_2of4'); print('pydantic' in sys.modules, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
    assert rac_modifier.recipe is recipe


def test_upstream_reads_what_the_public_function_returns():
    from llmcompressor.recipe import Recipe

    modifiers = Recipe.create_instance(rac_modifier.recipe("rac_2of4")).modifiers
    assert [(type(m).__name__, m.mask_structure) for m in modifiers] == [
        ("ReasoningAwareSparseGPTModifier", "2:4")
    ]
