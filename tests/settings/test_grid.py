"""Grids of recipes: what they share, what they set, and every mistake named before anything
runs."""

import pytest
import yaml

from rac_modifier.errors import RacError
from rac_modifier.settings.grid import (
    Grid,
    GridEvaluation,
    _grid_names,
    load_grid,
    plan_rows,
    shared_prompt,
)
from tests.tiny import NAME

SPARSE = {NAME: {"sparsity": 0.5}}
W4A16 = {"scheme": "W4A16", "ignore": ["lm_head"]}
GPTQ = {"ReasoningAwareCalibrationModifier": {}, "GPTQModifier": W4A16}


def grid(*rows, **parts):
    whole = [{"label": f"row {i}", "recipe": SPARSE, **row} for i, row in enumerate(rows)]
    return Grid(rows=whole, **parts)


def entry_of(planned):
    (groups,) = planned.recipe.values()
    (modifiers,) = groups.values()
    return next(iter(modifiers.values()))


def test_shared_settings_replace_those_of_a_recipe_and_a_row_replaces_both():
    shared = {"traces": {"sampling": {"max_new_tokens": 64}}, "calibration": {"tokens": 1000}}
    given = grid(
        {"recipe": "rac_2of4"},
        {"set": {"calibration.tokens": 2000, "sparsity": 0.6, "traces.sampling.seed": 3}},
        {"set": {"traces": None, "calibration.mixture": {"generic": 1.0}}},
        shared=shared,
    )
    shipped, changed, generic = map(entry_of, plan_rows(given, "grid"))
    assert shipped["mask_structure"] == "2:4"
    problems = {"problems": {"source": "arithmetic"}}
    assert shipped["traces"] == {**problems, "sampling": {"max_new_tokens": 64}}
    assert shipped["calibration"]["tokens"] == 1000
    assert changed["sparsity"] == 0.6
    assert changed["calibration"] == {"tokens": 2000}
    assert changed["traces"] == {"sampling": {"max_new_tokens": 64, "seed": 3}}
    calibration = {"tokens": 1000, "mixture": {"generic": 1.0}}
    assert generic == {"sparsity": 0.5, "calibration": calibration}


def test_the_arguments_of_a_recipe_are_no_modifiers():
    recipe = {"args": {"share": 0.5}, "a_stage": {"a_modifiers": SPARSE}}
    (planned,) = plan_rows(grid({"recipe": recipe}), "grid")
    assert (planned.group, planned.recipe) == ("sparse", recipe)


def test_a_row_with_seeds_is_run_once_per_seed():
    one, two = plan_rows(grid({"label": "50 %", "seeds": [0, 7]}), "grid")
    assert (one.label, one.row, one.seed) == ("50 %, seed 0", "50 %", 0)
    assert (two.label, two.row, two.seed) == ("50 %, seed 7", "50 %", 7)
    assert [entry_of(run)["calibration"]["seed"] for run in (one, two)] == [0, 7]


def test_a_row_without_a_group_is_in_that_of_what_it_does():
    quantized = {NAME: {"sparsity": 0.5, "quantization": {"scheme": "W4A16"}}}
    reap = {"REAPPruningModifier": {"sparsity": 0.5}}
    recipes = (
        quantized,
        GPTQ,
        {"ReasoningAwareCalibrationModifier": {}, **reap},
        {**reap, NAME: {"sparsity": 0.5}},
    )
    rows = ({}, *({"recipe": recipe} for recipe in recipes), {"recipe": GPTQ, "group": "upstream"})
    groups = [run.group for run in plan_rows(grid(*rows), "grid")]
    sparse, quantized, dense = "sparse", "sparse + quantized", "dense quantized"
    assert groups == [sparse, quantized, dense, "fewer experts", sparse, "upstream"]


def test_all_mistakes_are_in_one_message_with_the_rows_that_could_run():
    given = grid(
        {"label": "good"},
        {"label": "too sparse", "set": {"sparsity": 1.5}},
        {"label": "unknown", "recipe": "rac_2of5"},
        {"label": "typo", "set": {"sparsit": 0.5}},
        {"label": "twice"},
        {"label": "twice", "seeds": None},
        {"label": "dense"},
        {"label": "checked", "set": {"sparsity": 0.3}},
    )

    def check(recipe):
        if "0.3" in yaml.safe_dump(recipe):
            raise RacError("does not fit the model")

    with pytest.raises(RacError) as caught:
        plan_rows(given, "my.yaml", check)
    message = str(caught.value)
    for part in (
        "my.yaml: nothing was started",
        "\n- too sparse: its recipe: ",
        "1.5",
        "\n- unknown: no recipe 'rac_2of5'; did you mean rac_2of4",
        "\n- typo: ",
        "there is no such setting",
        "\n- twice: this label is used twice; give each row its own",
        "\n- dense: this label is used twice (it is that of the dense model)",
        "\n- checked: does not fit the model",
        "Rows that could run: good, twice, twice, dense",
    ):
        assert part in message


def test_problems_that_are_calibrated_on_are_not_evaluated_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    columns = {"column": "question", "answer_column": "answer"}
    data = {"source": "openai/gsm8k", "config": "main", "split": "train"}
    for calibrated, evaluated, refused in (
        ({"source": "./q.jsonl"}, {"source": "q.jsonl"}, True),
        ({"source": "q.jsonl"}, {"source": str(tmp_path / "q.jsonl")}, True),
        ({"source": "q.jsonl"}, {"source": "other.jsonl"}, False),
        (data, {"source": "openai/gsm8k"}, True),
        (data, {"source": "openai/gsm8k", "split": "test"}, False),
    ):
        shared = {"traces": {"problems": calibrated | columns}}
        given = grid({}, shared=shared, evaluation=evaluated | columns)
        if refused:
            with pytest.raises(RacError, match=r"calibrates on .*, the problems of"):
                plan_rows(given, "grid")
        else:
            assert plan_rows(given, "grid")


def test_all_models_are_asked_with_the_prompt_of_the_rows():
    def asked(*rows, **evaluation):
        planned = plan_rows(grid(*rows), "grid")
        return shared_prompt(planned, GridEvaluation(**evaluation), "grid")

    brief = {"traces.sampling.system_prompt": "Be brief."}
    assert asked({"set": brief}, {"set": brief}).system_prompt == "Be brief."
    assert not asked({"set": brief}, thinking=False).thinking
    generic = {"calibration.mixture": {"generic": 1.0}}
    assert asked({"set": generic}).system_prompt is None
    assert not asked({"set": generic}, thinking=False).thinking
    with pytest.raises(RacError, match="its rows calibrate with different prompts"):
        asked({"set": brief}, {})
    mixed = {"traces.sampling.thinking": False}
    with pytest.raises(RacError, match="thinking there or under evaluation"):
        asked({"set": mixed}, {})
    assert asked({"set": mixed}, {}, thinking=True).thinking


NEAREST = {"QuantizationModifier": W4A16}


def test_a_row_of_upstreams_modifiers_alone_calibrates_on_nothing():
    staged = {"q_stage": {"q_modifiers": NEAREST}}
    rows = {"recipe": NEAREST}, {"recipe": staged, "group": "other"}
    given = grid(*rows, shared={"calibration": {"tokens": 1000}})
    nearest, whole = plan_rows(given, "grid")
    assert entry_of(nearest) == W4A16
    assert (nearest.group, nearest.prompts) == ("dense quantized", ())
    assert (whole.recipe, whole.group) == (staged, "other")


def test_what_has_no_effect_on_such_a_row_is_refused():
    for row, name in (({"seeds": [0]}, "seed"), ({"set": {"calibration.tokens": 9}}, "tokens")):
        with pytest.raises(RacError, match=f"calibration.{name} changes an entry of ours, and its"):
            plan_rows(grid({"recipe": NEAREST, **row}), "grid")


@pytest.mark.parametrize("name", _grid_names())
def test_shipped_grids_can_be_run(name):
    planned = plan_rows(load_grid(name), name)
    assert len({run.label for run in planned}) == len(planned) >= 4


ROW = "rows: [{label: a, recipe: b}]"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("rows: [", "is not YAML"),
        ("rows: []", "rows: "),
        ("rows: [{label: a}]", "rows.0.recipe: is missing; add it"),
        (f"{ROW}\nevaluation: {{problem: 3}}", "evaluation.problem: there is no such setting"),
        (f"{ROW}\nevaluation: {{concurrency: 9}}", "concurrency: 9 has no effect without serve"),
        ("rows: [{label: 50, recipe: b}]", "rows.0.label: must be a valid string (value 50)"),
        ("- 1", "must be a valid dictionary"),
    ],
)
def test_a_file_that_is_no_grid(tmp_path, text, says):
    (tmp_path / "grid.yaml").write_text(text)
    with pytest.raises(RacError) as caught:
        load_grid(tmp_path / "grid.yaml")
    assert says in str(caught.value)
    with pytest.raises(RacError, match="name a YAML file, or one of contenders, paper, small"):
        load_grid(tmp_path / "none.yaml")
