"""`rac recipes` and `rac recipes show NAME`."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parents[2] / "rac_modifier" / "recipes"


def test_a_line_for_each_recipe_with_its_name_and_what_it_does(rac):
    code, stdout, stderr = rac("recipes")
    assert (code, stderr) == (0, "")
    lines = stdout.splitlines()
    assert [line.split()[0] for line in lines] == sorted(
        path.stem for path in FOLDER.glob("*.yaml")
    )
    for line in lines:
        name, text = line.split(maxsplit=1)
        assert (FOLDER / f"{name}.yaml").read_text().startswith(f"# {text}\n")
    assert len({line.index(line.split(maxsplit=1)[1]) for line in lines}) == 1  # one column


def test_show_prints_the_file_as_it_is(rac, tmp_path):
    code, stdout, _ = rac("recipes", "show", "rac_2of4")
    assert code == 0
    assert stdout == (FOLDER / "rac_2of4.yaml").read_text()
    (tmp_path / "mine.yaml").write_text(stdout)
    assert rac("prune", "--check", tmp_path / "mine.yaml")[0] == 0


def test_show_of_an_unknown_name_is_one_message(rac):
    code, stdout, stderr = rac("recipes", "show", "rac_2of5")
    assert (code, stdout) == (1, "")
    assert "did you mean rac_2of4" in stderr


def test_a_recipe_is_named_without_a_path(rac, tiny_folder, tmp_path):
    store = f"traces.store={tmp_path / 'store.jsonl'}"
    small = [
        "calibration.tokens=300",
        "traces.sampling.max_new_tokens=20",
        "traces.sampling.temperature=1.0",
        store,
    ]
    settings = [argument for setting in small for argument in ("--set", setting)]
    code, stdout, _ = rac("prune", tiny_folder, tmp_path / "out", "--recipe", "rac_2of4", *settings)
    assert code == 0
    assert f"rac inspect {tmp_path / 'out'}" in stdout
    assert "2:4" in (tmp_path / "out" / "rac_run.json").read_text()


def test_a_misspelt_name_is_refused_before_anything_is_loaded(rac, tmp_path):
    code, _, stderr = rac("prune", "no-such-model", tmp_path / "out", "--recipe", "rac_2of5")
    assert code == 1
    assert "no recipe at rac_2of5; did you mean rac_2of4" in stderr
