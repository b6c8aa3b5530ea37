"""Whole entries: their dumps can be run again, and settings without an effect are refused."""

import json

import pytest
import yaml
from pydantic import ValidationError

from rac_modifier.errors import RacError
from rac_modifier.settings.calibration import CalibrationSettings
from rac_modifier.settings.entries import ENTRIES, CalibrationEntry, PruningEntry, idle_calibration
from rac_modifier.settings.recipe import check_entry
from rac_modifier.settings.traces import TraceSettings
from tests.settings.every_setting import merged, mixture, nested, recovered_text, traces

ENGINE = {"base_urls": ["http://127.0.0.1:9/v1"]}
SETTINGS = [
    {"mask_structure": "2:4"},
    {"sparsity": 0.6, "preset": "fast", "dampening_frac": 0.1},
    {"sparsity": 0.6, "preset": "paper", "solver": "magnitude"},
    {"solver": "keep", "quantization": {"scheme": "W4A16"}},
    {"sparsity": 0.5, "allocation": {"a": 0.25}},
    {"sparsity": 0.5, "calibration": {"mixture": "prompts@1"}, "traces": {"sampling": {"seed": 4}}},
    {"sparsity": 0.5, "calibration": {"mixture": "text:python-docs@1", "seed": 5}},
    {
        "sparsity": 0.5,
        "traces": {
            "engine": ENGINE,
            "select": {"pass_rate": (0.2, 0.8)},
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
    for name in ("solver", "refits", "reconstruct", "order", "pattern", "traces", "calibration"):
        assert getattr(again, name) == getattr(entry, name), name


def test_a_dump_leaves_out_what_was_not_written_and_what_has_no_effect():
    written = {"sparsity": 0.6, "preset": "paper", "calibration": {"tokens": 7}}
    assert PruningEntry(**written).model_dump(exclude_unset=True) == written
    dump = PruningEntry(mask_structure="2:4").model_dump()
    assert not {"sparsity", "preset", "refit"} & dump.keys()
    assert "allow_off_policy" not in dump["traces"]
    assert "generic" not in dump["calibration"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"calibration": {"batch_tokens": 64}}, "has no effect on the recipe's other modifiers"),
        ({"sparsity": 0.5}, "Extra inputs"),
        ({"start": 0}, "Extra inputs"),  # of upstream's Modifier
        ({"calibration": {"mixture": "traces:maths@1"}}, "traces:maths, which is not among"),
        (
            {"recover": {}, "calibration": {"mixture": {"generic": 1.0}}},
            "give traces a share of calibration.mixture, or leave recover out",
        ),
    ],
)
def test_what_calibration_alone_does_not_take(settings, message):
    with pytest.raises(ValidationError, match=message):
        CalibrationEntry(**settings)


@pytest.mark.parametrize("name", ENTRIES)
def test_upstreams_fields_are_no_settings(name):
    upstream = {"index", "group", "start", "end", "update", "initialized_"}
    assert not upstream & ENTRIES[name].model_fields.keys()


INT4 = {"quantization": {"scheme": "W4A16"}}
ALONE = {"solver": "none", "mask_structure": None, **INT4}
KEEP = {"solver": "keep", "mask_structure": None}
PAPER = {"preset": "paper"}
MAGNITUDE = {**PAPER, "solver": "magnitude"}
FILE = {"source": "problems.jsonl", "column": "problem"}
PROMPTS, TEXT, BOTH = mixture("prompts@1"), mixture("text@1"), mixture("prompts@0.5, text@0.5")
NAMED = {"traces": {"sources": {"s": {"problems": {}, "select": {}}}}, **mixture("traces:s@1")}
NAMED_PROMPTS = {"traces": {"sources": {"s": {"problems": {}}}}, **mixture("prompts:s@1")}


def sampling(**settings):
    return traces(sampling=settings)


# What is refused with what: path, value, and the other settings of the entry.
REFUSED = [
    ("sparsity", 0.5, {}),
    *((name, value, KEEP) for name, value in {"sparsity": 0.5, "allocation": {"a": 0.4}}.items()),
    *(
        (name, value, ALONE)
        for name, value in {
            "sparsity": 0.5, "mask_structure": "2:4", "refit": True, "storage": "dense",
            "iterations": 2, "allocation": {"a": 0.4},
        }.items()
    ),
    ("iterations", 2, {"solver": "wanda"}),
    ("refit", True, {}),
    ("refit", False, {"solver": "alps"}),
    ("dampening_frac", 0.5, MAGNITUDE),
    ("experts", "all", PAPER),
    ("experts", "all", {"order": "auto", **MAGNITUDE}),
    ("expert_floor", 64, {"experts": "all"}),
    ("calibration.prompt_weight", 0.5, MAGNITUDE),
    ("preset", "fast", {"solver": "alps", "reconstruct": "dense", "order": "auto"}),
    ("traces.store", "other.jsonl", PROMPTS),
    ("traces.store", "other.jsonl", NAMED),
    ("traces.sampling.seed", 1, TEXT),
    ("traces.problems.limit", 3, NAMED),
    ("traces.select.finished", True, NAMED),
    ("traces.problems.split", "train", traces(problems=FILE)),
    ("traces.problems.answer_column", "answer", {**PROMPTS, "traces": {"problems": FILE}}),
    ("traces.sampling.max_new_tokens", 8, PROMPTS),
    ("traces.sampling.top_p", 0.3, sampling(temperature=0)),
    ("traces.sampling.temperature", 0.2, sampling(top_k=1)),
    ("traces.sampling.thinking", False, sampling(template="none")),
    ("traces.sampling.batch_size", 2, traces(engine=ENGINE)),
    ("traces.select.finished", True, PROMPTS),
    ("traces.select.max_tokens", 12, sampling(max_new_tokens=12)),
    ("traces.engine", ENGINE, PROMPTS),
    ("traces.allow_off_policy", True, {}),
    ("traces.allow_off_policy", True, NAMED),
    ("traces.sources.s.problems.limit", 3, {}),
    ("traces.sources.s.select.finished", True, NAMED_PROMPTS),
    ("calibration.prompt_weight", 0.5, PROMPTS),
    ("calibration.held_out_tokens", 50, PROMPTS),
    ("recover.generic.sequence_tokens", 64, {"recover": {}}),
    ("recover.generic.column", "text", recovered_text({"source": "text.txt"})),
    ("calibration.generic.sequence_tokens", 64, {}),
    ("calibration.generic.split", "test", TEXT),
]  # fmt: skip


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
    with pytest.raises(RacError) as caught:
        check_entry({"sparsity": 0.5, "preset": "fast", "solver": "alps", "refit": True,
                     "traces": {"allow_off_policy": True}}, "recipe.yaml")  # fmt: skip
    assert str(caught.value).removeprefix("recipe.yaml: ").splitlines() == [
        "traces.allow_off_policy: True has no effect without a store, which could be another "
        "model's; leave it out",
        "refit: True has no effect with solver: alps, which always refits; leave it out",
    ]
    check_entry({"sparsity": 0.5, "preset": "fast", "solver": "alps"}, "r")  # the preset's refit


def idle(line, **settings):
    calibration = CalibrationSettings(mixture=line)
    return {".".join(path) for path in idle_calibration(TraceSettings(**settings), calibration)}


def test_what_has_an_effect_is_not_refused():
    assert idle("traces@1") == {
        "traces.problems.split",
        "traces.allow_off_policy",
        "calibration.generic",
    }
    assert "traces.problems" not in idle("prompts@1")
    assert "calibration.prompt_weight" not in idle("prompts@0.5, text@0.5")
    assert not any(name.startswith("traces.") for name in idle("text@1"))
    sources = {"own": {"problems": {}, "select": {}}, "less": {"problems": {}}}
    assert "traces.select" in idle("traces:own@1", sources=sources)
    assert "traces.select" not in idle("traces:own@0.5, traces:less@0.5", sources=sources)
    assert "traces.sources.less" in idle("traces:own@1", sources=sources)
    select = {"sampling": {"max_new_tokens": 10}, "select": {"max_tokens": 10}}
    foreign = {"store": "s", "allow_off_policy": True}  # may hold longer traces
    assert "traces.select.max_tokens" not in idle("traces@1", **select, **foreign)
