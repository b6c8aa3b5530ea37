import json

import pytest
import yaml
from pydantic import ValidationError

from rac_modifier.settings.entries import ENTRIES, CalibrationEntry, PruningEntry

SETTINGS = [
    {"mask_structure": "2:4"},
    {"sparsity": 0.6, "preset": "fast", "block_size": 64},
    {"sparsity": 0.6, "preset": "paper", "solver": "magnitude"},
    {"solver": "keep", "quantization": {"scheme": "W4A16"}},
    {"sparsity": 0.5, "allocation": {"a": 0.25}},
    {"sparsity": 0.5, "calibration": {"mixture": "prompts@1"}, "traces": {"sampling": {"seed": 4}}},
    {"sparsity": 0.5, "calibration": {"mixture": "text:python-docs@1", "seed": 5}},
    {
        "sparsity": 0.5,
        "traces": {
            "engine": {"base_urls": ["http://127.0.0.1:8000"]},
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
    for name in ("solver", "refits", "reconstruct", "order", "pattern", "allocation", "traces"):
        assert getattr(again, name) == getattr(entry, name), name
    assert again.calibration == entry.calibration


def test_a_dump_leaves_out_what_was_not_written_and_what_has_no_effect():
    written = {"sparsity": 0.6, "preset": "paper", "calibration": {"tokens": 7}}
    assert PruningEntry(**written).model_dump(exclude_unset=True) == written
    dump = PruningEntry(mask_structure="2:4").model_dump()
    assert not {"sparsity", "preset", "refit", "block_size"} & dump.keys()
    assert "retry_failed" not in dump["traces"]
    assert "generic" not in dump["calibration"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"calibration": {"prompt_weight": 0.5}}, "has no effect on the recipe's other modifiers"),
        ({"calibration": {"batch_tokens": 64}}, "has no effect on the recipe's other modifiers"),
        ({"sparsity": 0.5}, "Extra inputs"),
        ({"start": 0}, "Extra inputs"),  # of upstream's Modifier
        ({"calibration": {"mixture": "traces:maths@1"}}, "traces:maths, which is not among"),
    ],
)
def test_what_calibration_alone_does_not_take(settings, message):
    assert CalibrationEntry().model_dump().keys() == {
        "tokenizer", "traces", "calibration", "recover",
    }  # fmt: skip
    with pytest.raises(ValidationError, match=message):
        CalibrationEntry(**settings)


@pytest.mark.parametrize("name", ENTRIES)
def test_upstreams_fields_are_no_settings(name):
    upstream = {"index", "group", "start", "end", "update", "initialized_"}
    assert not upstream & ENTRIES[name].model_fields.keys()
