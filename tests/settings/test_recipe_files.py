"""Recipes that are named without a path, and YAML that could hang, hide a setting or change its
type."""

import os
from pathlib import Path

import pytest

import rac_modifier
from rac_modifier.errors import RacError
from rac_modifier.settings.recipe_files import (
    find_recipe,
    parse_yaml,
    read_yaml,
    recipe,
    recipe_names,
)

FOLDER = Path(__file__).parents[2] / "recipes"
NINE = ", ".join(["*{}"] * 9)
LAUGHS = "a: &a [x]\n" + "".join(
    f"{name}: &{name} [{NINE.replace('{}', below)}]\n"
    for below, name in zip("abcdefgh", "bcdefghi", strict=True)
)


def test_every_file_of_the_folder_is_a_recipe():
    files = sorted(FOLDER.iterdir())
    assert recipe_names() == [path.name.removesuffix(".yaml") for path in files]
    assert [recipe(name) for name in recipe_names()] == list(map(str, files))
    assert find_recipe("rac_2of4") == find_recipe(FOLDER / "rac_2of4.yaml")


@pytest.mark.parametrize("function", [recipe, find_recipe])
def test_an_unknown_name_is_refused(function, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RacError, match=r"rac_2of5'?; did you mean .*\brac_2of4\b.*`rac recipes`"):
        function("rac_2of5")
    with pytest.raises(RacError, match=r"zzz'?; name a YAML file, or one of the recipes that"):
        function("zzz")
    with pytest.raises(RacError, match="no recipe"):
        function("../rac_2of4")


def test_a_file_of_the_user_comes_before_a_shipped_recipe_and_a_folder_does_not(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rac_2of4").mkdir()  # such as the output of an earlier run
    assert find_recipe("rac_2of4") == FOLDER / "rac_2of4.yaml"
    (tmp_path / "rac_fp8").write_text("mine")
    assert find_recipe("rac_fp8").read_text() == "mine"


def test_upstream_reads_what_the_public_function_returns():
    from llmcompressor.recipe import Recipe

    (modifier,) = Recipe.create_instance(rac_modifier.recipe("rac_2of4")).modifiers
    assert modifier.mask_structure == "2:4"


def test_plain_data():
    text = "a: [1, 2.5, .inf, yes, null, x, 2:4]\nbase: &b {c: 1}\nd: {<<: *b, e: 2}\n"
    assert parse_yaml(text, "bad") == {
        "a": [1, 2.5, float("inf"), True, None, "x", "2:4"],
        "base": {"c": 1},
        "d": {"c": 1, "e": 2},
    }
    assert parse_yaml("", "bad") is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, "its aliases repeat over 100000 values"),
        ("a: &a [*a]", "its aliases repeat"),
        ("[" * 2000, "nested too deep"),
        ("a: 1\nb: 2\na: 3", "'a' is written twice"),
        ("? [a]\n: 1", "a key is no text"),
        ("a: " + "9" * 5000, "4300 digits"),
        ("a: 0x" + "f" * 5000, "an integer is too large"),
        ("!!python/name:os.system", "could not determine a constructor"),
        ("a: \x00", "unacceptable character"),
        ("a: 1\nb: !!timestamp foo", "'foo' is no timestamp.*line 2"),
        ("a: !!int ''", "'' is no int.*line 1"),
        ("a: !!bool maybe", "'maybe' is no bool.*line 1"),
        ("a: !!map [1]", "expected a mapping node"),
    ],
)
def test_what_is_refused(text, message):
    with pytest.raises(RacError, match=f"(?s)^bad \\(.*{message}"):
        parse_yaml(text, "bad")


def test_a_file_that_is_no_regular_small_text_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "large.yaml").write_text("#" * (1 << 20) + "#")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff")
    for name, message in {
        "pipe.yaml": "no regular file is there",
        "large.yaml": "has over 1048576 bytes",
        "bytes.yaml": "cannot be read",
        "no.yaml": "No such file",
    }.items():
        with pytest.raises(RacError, match=message):
            read_yaml(tmp_path / name, "recipe", "name a YAML file")
