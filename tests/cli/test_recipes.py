"""`rac recipes` and `rac recipes show NAME`."""

from itertools import pairwise
from pathlib import Path

from tests.tiny import NAME, entry, recipe

FOLDER = Path(__file__).parents[2] / "recipes"


def test_the_recipes_are_listed_in_groups_the_recommended_first(rac):
    lines = rac.output("recipes").splitlines()
    names = [line.strip() for line in lines if line.startswith("  rac_")]
    assert sorted(names) == sorted(path.stem for path in FOLDER.glob("*.yaml"))
    assert (lines[0][:10], names[0], len(names) <= 14) == ("start here", "rac_w4a16", True)
    for name, text in pairwise(lines):
        if name.startswith("  rac_"):
            assert (FOLDER / f"{name.strip()}.yaml").read_text().startswith(f"# {text.strip()}\n")


def test_show_prints_the_file_as_it_is(rac, tmp_path):
    code, stdout, _ = rac("recipes", "show", "rac_2of4")
    assert (code, stdout) == (0, (FOLDER / "rac_2of4.yaml").read_text())
    code, stdout, stderr = rac("recipes", "show", "rac_2of5")
    assert (code, stdout) == (1, "")
    assert "did you mean rac_2of4" in stderr


def test_check_names_each_valid_recipe_and_every_mistake_of_the_others(rac, tmp_path):
    recipes = {"a": {"sparsty": 0.5}, "b": entry(), "c": entry(refit=True, iterations=0)}
    for name, settings in recipes.items():
        (tmp_path / f"{name}.yaml").write_text(recipe(settings))
    code, stdout, stderr = rac("recipes", "check", *(tmp_path / f"{name}.yaml" for name in "abc"))
    assert code == 1
    assert "b.yaml: valid" in stdout
    assert "a.yaml: sparsty: there is no such setting" in stderr
    assert "c.yaml: iterations: " in stderr
    checked = ("recipes", "check", "rac_2of4", "rac_gptq_w4a16", "-s", "tokenizer=a")
    code, stdout, stderr = rac(*checked)
    assert (code, stderr) == (0, "")
    assert stdout.splitlines() == [
        f"rac_2of4: valid ({NAME})",
        "rac_gptq_w4a16: valid (ReasoningAwareCalibrationModifier)",
    ]


def test_schema_prints_the_published_file_and_nothing_else(rac):
    published = FOLDER.parent / "docs" / "recipe.schema.json"
    assert rac.output("schema") == published.read_text()
