"""Whole entries: their dumps can be run again, and settings without an effect are refused."""

import json
from collections.abc import Mapping
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from rac_modifier.errors import RacError
from rac_modifier.settings.check import check_settings
from rac_modifier.settings.entries import CalibrationEntry, PruningEntry


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings with those of `above` over those of `below`; None takes one out."""
    result = dict(below)
    for name, value in above.items():
        old = result.pop(name, None)
        if value is not None:
            both = isinstance(value, Mapping) and isinstance(old, Mapping)
            result[name] = merged(old, value) if both else value
    return result


def nested(path: str, value: Any) -> dict[str, Any]:
    """{"a": {"b": value}} for "a.b"."""
    for name in reversed(path.split(".")):
        value = {name: value}
    return dict(value)


def check_entry(entry: dict[str, Any], where: str) -> None:
    check_settings(PruningEntry, entry, where)


def mixture(*parts: str) -> dict[str, Any]:
    """Equal shares of these parts."""
    return {"calibration": {"mixture": {part: 1 / len(parts) for part in parts}}}


ENGINE = {"base_urls": ["http://127.0.0.1:9/v1"]}
SETTINGS = [
    {"mask_structure": "2:4"},
    {"sparsity": 0.6, "preset": "paper", "solver": "magnitude"},
    {"solver": "keep", "quantization": {"scheme": "W4A16"}},
    {"sparsity": 0.5, "calibration": {"mixture": {"generic": 1.0}, "seed": 5}},
    {
        "sparsity": 0.5,
        "traces": {
            "engine": ENGINE,
            "select": {"answers": "correct"},
            "sampling": {"samples_per_problem": 4, "temperature": 0.7},
            "sources": {"math": {"problems": {"source": "open-r1/OpenR1-Math-220k"}}},
        },
        "calibration": {"mixture": {"traces": 0.5, "prompts:math": 0.5}},
    },
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("mode", ["python", "json"])
def test_a_dump_is_plain_and_can_be_run_again(settings, mode):
    """llm-compressor writes one into recipe.yaml and the run record holds one."""
    entry = PruningEntry(**settings)
    dump = entry.model_dump(mode=mode)
    assert yaml.safe_load(yaml.safe_dump(dump)) == json.loads(json.dumps(dump)) == dump
    again = PruningEntry(**dump)
    assert again.model_dump(mode=mode) == dump
    for name in ("solver", "refit", "reconstruct", "order", "pattern", "traces", "calibration"):
        assert getattr(again, name) == getattr(entry, name), name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"calibration": {"batch_tokens": 64}}, "has no effect on the recipe's other modifiers"),
        ({"sparsity": 0.5}, "Extra inputs"),
        ({"start": 0}, "Extra inputs"),  # of upstream's Modifier
        ({"calibration": {"mixture": {"traces:maths": 1}}}, "traces:maths, which is not among"),
        ({"recover": {}}, "Extra inputs"),
    ],
)
def test_what_calibration_alone_does_not_take(settings, message):
    with pytest.raises(ValidationError, match=message):
        CalibrationEntry(**settings)


ALONE = {"solver": "none", "mask_structure": None, "quantization": {"scheme": "W4A16"}}
KEEP = {"solver": "keep", "mask_structure": None}
PAPER = {"preset": "paper"}
PROMPTS, TEXT = mixture("prompts"), mixture("generic")
NAMED = {"traces": {"sources": {"s": {"problems": {}, "select": {}}}}, **mixture("traces:s")}

# What is refused with what: path, value, and the other settings of the entry.
REFUSED = [
    ("sparsity", 0.5, {}),
    ("sparsity", 0.5, KEEP),
    ("sparsity", 0.5, ALONE),
    ("mask_structure", "2:4", ALONE),
    ("iterations", 2, {"solver": "wanda"}),
    ("dampening_frac", 0.5, {**PAPER, "solver": "magnitude"}),
    ("expert_floor", 64, PAPER),
    ("traces.store", "other.jsonl", PROMPTS),
    ("traces.store", "other.jsonl", NAMED),
    ("traces.sampling.seed", 1, TEXT),
    ("traces.problems.limit", 3, NAMED),
    ("traces.select.finished", True, NAMED),
    ("traces.sampling.max_new_tokens", 8, PROMPTS),
    ("traces.sampling.top_p", 0.3, {"traces": {"sampling": {"temperature": 0}}}),
    ("traces.select.finished", True, PROMPTS),
    ("traces.engine", ENGINE, PROMPTS),
    ("calibration.generic.sequence_tokens", 64, {}),
]


@pytest.mark.parametrize(("path", "value", "others"), REFUSED)
def test_what_has_no_effect_is_refused_by_name_and_value(path, value, others):
    base = merged({"mask_structure": "2:4"}, others)
    check_entry(base, "recipe.yaml")
    with pytest.raises(RacError) as caught:
        check_entry(merged(base, nested(path, value)), "recipe.yaml")
    assert "has no effect" in str(caught.value)
    assert path.partition(".")[0] in str(caught.value)
    assert str(value) in str(caught.value)


def test_all_of_them_are_in_one_message_with_their_values_and_why():
    settings = {"solver": "none", "quantization": {"scheme": "W4A16"}}
    with pytest.raises(RacError) as caught:
        check_entry({**settings, "sparsity": 0.5, "iterations": 3}, "recipe.yaml")
    assert str(caught.value).removeprefix("recipe.yaml: ").splitlines() == [
        "sparsity: 0.5 has no effect with solver: none; leave it out",
        "iterations: 3 has no effect with solver: none; alps uses it; leave it out",
    ]
    check_entry({"sparsity": 0.5, "preset": "fast", "solver": "alps"}, "r")  # the preset's refit
    with pytest.raises(RacError, match=r"traces\.sources\.math has no effect unless the mixture"):
        check_entry({**settings, "traces": {"sources": {"math": {"problems": {}}}}}, "r")


def test_what_has_an_effect_is_not_refused():
    selected = {"traces": {"select": {"finished": True}}}
    check_entry({"sparsity": 0.5, "traces": {"problems": {"limit": 3}}, **PROMPTS}, "r")
    check_entry({"sparsity": 0.5, **selected, **mixture("traces", "traces:a.jsonl")}, "r")
    check_entry({"sparsity": 0.5, **mixture("prompts", "generic")}, "r")


@pytest.mark.parametrize(
    ("parts", "other", "says"),
    [
        (("traces", "traces:s"), {}, "traces and traces:s have the same traces"),
        (("traces:s", "traces:arithmetic"), {}, "traces:s and traces:arithmetic have the same"),
        (("traces", "traces:s"), {"thinking": False}, None),
        (("traces", "prompts:s"), {"select": None}, None),
    ],
)
def test_two_parts_with_the_same_traces_are_refused(parts, other, says):
    """Each holds out another share of them, so one would calibrate on what is held out."""
    source = {"problems": {"limit": 99}, "select": {"finished": True}, **other}
    settings = {"sparsity": 0.5, "traces": {"sources": {"s": source}}, **mixture(*parts)}
    if says is None:
        check_entry(settings, "r")
        return
    with pytest.raises(RacError, match=f"{says}.*; leave one out, or give it other problems"):
        check_entry(settings, "r")
