"""The combinations in which a setting has no effect, and is refused."""

import pytest

from rac_modifier.errors import RacError
from rac_modifier.settings.calibration import CalibrationSettings
from rac_modifier.settings.idle import idle_calibration
from rac_modifier.settings.recipe import check_entry
from rac_modifier.settings.traces import TraceSettings
from tests.settings.every_setting import merged, mixture, nested, recovered_text, traces

INT4 = {"quantization": {"scheme": "W4A16"}}
ALONE = {"solver": "none", "mask_structure": None, **INT4}
KEEP = {"solver": "keep", "mask_structure": None}
PAPER = {"preset": "paper"}
MAGNITUDE = {**PAPER, "solver": "magnitude"}
FILE = {"source": "problems.jsonl", "column": "problem"}
PROMPTS, TEXT, BOTH = mixture("prompts@1"), mixture("text@1"), mixture("prompts@0.5, text@0.5")
SOURCE = {"problems": {}, "sampling": {"seed": 1}, "select": {}}
NAMED = {"traces": {"sources": {"s": SOURCE}}, **mixture("traces:s@1")}
NAMED_PROMPTS = {"traces": {"sources": {"s": {"problems": {}}}}, **mixture("prompts:s@1")}
ENGINE = {"base_urls": ["http://127.0.0.1:9/v1"]}
LIMIT = "quantization.int8_activation_limit"


def sampling(**settings):
    return traces(sampling=settings)


# What is refused with what: path, value, and the other settings of the entry.
REFUSED = [
    ("sparsity", 0.5, {}),
    *((name, value, KEEP) for name, value in {"sparsity": 0.5, "allocation": {"a": 0.4}}.items()),
    *(
        (name, value, ALONE)
        for name, value in {
            "sparsity": 0.5, "mask_structure": "2:4", "refit": True, "storage": "dense", "block_size": 16, "iterations": 2,
            "allocation": {"a": 0.4},
        }.items()
    ),
    (LIMIT, 0.5, {**INT4, "calibration": {"held_out_tokens": 0}}),
    (LIMIT, 0.5, {**INT4, **PROMPTS}),
    (LIMIT, 0.5, {**INT4, "storage": "dense"}),
    (LIMIT, 0.5, {"quantization": {"scheme": "FP8_DYNAMIC"}}),
    (LIMIT, 0.5, ALONE),
    *(("block_size", 16, {"solver": solver}) for solver in ("alps", "wanda", "magnitude")),
    *(("iterations", 2, {"solver": solver}) for solver in ("sparsegpt", "wanda", "magnitude")),
    ("refit", True, {}),
    ("refit", False, {"solver": "alps"}),
    *(("dampening_frac", 0.5, {**PAPER, "solver": solver}) for solver in ("wanda", "magnitude")),
    ("experts", "all", PAPER),
    ("experts", "all", {"order": "auto", **MAGNITUDE}),
    ("expert_floor", 64, {"experts": "all"}),
    ("calibration.prompt_weight", 0.5, MAGNITUDE),
    ("preset", "fast", {"solver": "alps", "reconstruct": "dense", "order": "auto"}),
    ("traces.store", "other.jsonl", PROMPTS),
    ("traces.store", "other.jsonl", NAMED),
    ("traces.sampling.seed", 1, TEXT),
    ("traces.sampling.seed", 1, NAMED),
    ("traces.problems.limit", 3, NAMED),
    ("traces.problems.split", "train", traces(problems=FILE)),
    ("traces.problems.answer_column", "answer", {**PROMPTS, "traces": {"problems": FILE}}),
    *(
        (f"traces.sampling.{name}", value, PROMPTS)
        for name, value in {
            "temperature": 0.2, "top_p": 0.3, "top_k": 2, "max_new_tokens": 8, "samples_per_problem": 2, "batch_size": 2,
        }.items()
    ),
    ("traces.sampling.top_p", 0.3, sampling(temperature=0)),
    ("traces.sampling.temperature", 0.2, sampling(top_k=1)),
    ("traces.sampling.thinking", False, sampling(template="none")),
    ("traces.sampling.batch_size", 2, traces(engine=ENGINE)),
    ("traces.select.finished", True, PROMPTS),
    ("traces.select.repeated_tails", "keep", traces(select={"finished": True})),
    ("traces.select.max_tokens", 12, sampling(max_new_tokens=12)),
    ("traces.engine", ENGINE, PROMPTS),
    ("traces.retry_failed", True, {}),
    ("traces.allow_off_policy", True, {}),
    ("traces.sources.s.problems.limit", 3, {}),
    ("traces.sources.s.store", "other.jsonl", NAMED_PROMPTS),
    ("traces.sources.s.select.finished", True, NAMED_PROMPTS),
    ("traces.sources.s.sampling.max_new_tokens", 8, NAMED_PROMPTS),
    ("calibration.prompt_weight", 0.5, PROMPTS),
    ("calibration.answer_weight", 3.0, BOTH),
    ("calibration.trace_weighting", "correct", BOTH),
    ("calibration.held_out_tokens", 50, PROMPTS),
    ("recover.generic.sequence_tokens", 64, {"recover": {}}),
    ("recover.generic.column", "text", recovered_text({"source": "text.txt"})),
    ("calibration.generic.sequence_tokens", 64, {}),
    ("calibration.generic.split", "test", TEXT),
    ("calibration.texts.a.sequence_tokens", 64, {}),
    ("calibration.texts.a.column", "text", mixture("text:a@1", texts={"a": {}})),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value", "beside"), REFUSED)
def test_what_has_no_effect_is_refused_by_name_and_value(path, value, beside):
    base = merged({"mask_structure": "2:4"}, beside)
    check_entry(base, "recipe.yaml")
    with pytest.raises(RacError) as caught:
        check_entry(merged(base, nested(path, value)), "recipe.yaml")
    assert "has no effect" in str(caught.value)
    assert path.partition(".")[0] in str(caught.value)
    assert str(value) in str(caught.value)


def test_all_of_them_are_in_one_message_with_their_values_and_why():
    with pytest.raises(RacError) as caught:
        check_entry({"sparsity": 0.5, "refit": True, "block_size": 5}, "recipe.yaml")
    assert str(caught.value).removeprefix("recipe.yaml: ").splitlines() == [
        "block_size: 5 has no effect with solver: alps; sparsegpt uses it; leave it out",
        "refit: True has no effect with solver: alps, which always refits; leave it out",
    ]


def test_what_a_preset_sets_is_not_the_users():
    check_entry({"sparsity": 0.5, "preset": "fast", "solver": "alps"}, "r")  # its refit: true


def idle(line, **settings):
    calibration = CalibrationSettings(mixture=line, texts={"a": {}, "b": {}})
    return {".".join(path) for path in idle_calibration(TraceSettings(**settings), calibration)}


def test_what_has_an_effect_is_not_refused():
    assert idle("traces@1") == {
        "traces.problems.split",
        "traces.retry_failed",
        "traces.allow_off_policy",
        "calibration.generic",
        "calibration.texts.a",
        "calibration.texts.b",
    }
    assert "traces.problems" not in idle("prompts@1")
    weighed = {"calibration.prompt_weight", "calibration.texts.a"}
    assert not weighed & idle("prompts@0.5, text:a@0.5")
    assert not any(name.startswith("traces.") for name in idle("text@1"))


def test_named_sources():
    sources = {
        "own": {**SOURCE, "store": "a"},
        "less": {"problems": {}},
        "unused": {"problems": {}},
    }
    groups = {"traces.store", "traces.problems", "traces.sampling", "traces.select"}
    alone = idle("traces:own@1", sources=sources, store="s", allow_off_policy=True)
    assert groups | {"traces.sources.unused"} <= alone
    assert "traces.allow_off_policy" not in alone  # its store may be another model's
    both = idle("traces:own@0.5, prompts:less@0.5", sources=sources)
    assert "traces.sampling" not in both  # less has none of its own
    assert {"traces.sampling.temperature", "traces.select", "traces.sources.less.store"} <= both


def test_a_store_of_another_model_may_hold_longer_traces():
    select = {"sampling": {"max_new_tokens": 10}, "select": {"max_tokens": 10}}
    assert "traces.select.max_tokens" in idle("traces@1", **select)
    foreign = {"store": "s", "allow_off_policy": True}
    assert "traces.select.max_tokens" not in idle("traces@1", **select, **foreign)
