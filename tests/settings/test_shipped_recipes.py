"""Recipes that are named without a path; tests/settings/test_recipes_run.py runs them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import rac_modifier
from rac_modifier.errors import RacError
from rac_modifier.settings.shipped_recipes import find_recipe, recipe, recipe_names, summary

FOLDER = Path(__file__).parents[2] / "rac_modifier" / "recipes"
FILES = sorted(FOLDER.iterdir())


def test_every_file_of_the_folder_is_a_recipe_with_a_summary_of_its_own():
    assert recipe_names() == [path.name.removesuffix(".yaml") for path in FILES]
    assert {"rac_2of4", "rac_unstructured_50", "rac_gptq_w4a16"} <= set(recipe_names())
    summaries = {summary(name) for name in recipe_names()}
    assert len(summaries) == len(FILES)
    assert all(line.endswith(".") and 38 < len(line) < 123 for line in summaries)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_shipped_recipe_has_a_name_and_a_path(path):
    assert recipe(path.stem) == str(path)
    assert find_recipe(path.stem) == find_recipe(path) == path


@pytest.mark.parametrize("function", [recipe, find_recipe])
@pytest.mark.parametrize(
    ("name", "next_step"),
    [
        ("rac_2of5", r"did you mean .*\brac_2of4\b.*`rac recipes`"),
        ("rac_unstructured50", r"did you mean .*\brac_unstructured_50\b"),
        ("zzz", "name a YAML file, or one of the recipes that `rac recipes` lists"),
    ],
)
def test_an_unknown_name_is_refused(function, name, next_step, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RacError, match=rf"{name}'?; {next_step}"):
        function(name)


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


def test_upstream_reads_what_the_public_function_returns():
    from llmcompressor.recipe import Recipe

    (modifier,) = Recipe.create_instance(rac_modifier.recipe("rac_2of4")).modifiers
    assert modifier.mask_structure == "2:4"
