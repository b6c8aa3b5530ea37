import pytest
from pydantic import BaseModel

from rac_modifier.errors import RacError
from rac_modifier.settings.calibration import CalibrationSettings
from rac_modifier.settings.idle import idle_calibration, idle_pruning, refuse_idle
from rac_modifier.settings.pruning import PruningSettings
from rac_modifier.settings.traces import TraceSettings


def idle(mixture, **traces):
    calibration = CalibrationSettings(mixture=mixture, texts={"a": {}, "b": {}})
    return {".".join(path) for path in idle_calibration(TraceSettings(**traces), calibration)}


def test_all_of_them_are_in_one_message_with_their_values_and_why():
    class Both(BaseModel):
        pruning: PruningSettings

    both = Both(
        pruning=PruningSettings(sparsity=0.5, iterations=3, refit=True, solver="alps", block_size=5)
    )
    found = {("pruning", *path): why for path, why in idle_pruning(both.pruning).items()}
    with pytest.raises(RacError) as caught:
        refuse_idle(both, found)
    assert str(caught.value).splitlines() == [
        "pruning.block_size: 5 has no effect beside solver: alps; leave it out, or set solver: sparsegpt",
        "pruning.refit: True has no effect beside solver: alps, which always refits the kept weights; leave it out",
    ]


def test_what_a_preset_sets_is_not_the_users():
    settings = PruningSettings(
        sparsity=0.5, preset="fast", solver="alps"
    )  # the preset's refit: true
    assert ("refit",) in idle_pruning(settings)
    refuse_idle(settings, idle_pruning(settings))


def test_a_preset_of_which_nothing_is_left_is_refused():
    settings = PruningSettings(
        sparsity=0.5, preset="fast", solver="alps", reconstruct="pruned", order="auto"
    )
    with pytest.raises(
        RacError, match="preset: 'fast' has no effect beside solver, refit, reconstruct, order"
    ):
        refuse_idle(settings, idle_pruning(settings))


def test_traces_alone_leave_little_idle():
    assert idle("traces@1") == {
        "traces.problems.split",
        "traces.select.least_share",
        "traces.retry_failed",
        "traces.allow_off_policy",
        "calibration.generic",
        "calibration.texts.a",
        "calibration.texts.b",
    }


def test_prompts_alone():
    found = idle("prompts@1", store="s.jsonl")
    assert {
        "traces.store",
        "traces.select",
        "traces.engine",
        "traces.retry_failed",
        "traces.allow_off_policy",
    } <= found
    completions = {
        "temperature",
        "top_p",
        "top_k",
        "max_new_tokens",
        "samples_per_problem",
        "batch_size",
    }
    assert {
        name.removeprefix("traces.sampling.") for name in found if "sampling" in name
    } == completions
    assert {
        "calibration.held_out_tokens",
        "calibration.prompt_weight",
        "calibration.trace_weighting",
    } <= found
    assert "traces.problems" not in found


def test_prompts_beside_text_have_weights_of_their_own():
    found = idle("prompts@0.5, text:a@0.5")
    assert (
        not {"calibration.prompt_weight", "calibration.trace_weight", "calibration.texts.a"} & found
    )
    assert {"calibration.answer_weight", "calibration.texts.b", "calibration.generic"} <= found


def test_text_alone_needs_no_traces():
    assert {"traces", "calibration.trace_weight"} <= idle("text@1")
    assert not any(name.startswith("traces.") for name in idle("text@1"))


def test_named_sources():
    sources = {
        "own": {
            "problems": {},
            "sampling": {"seed": 1},
            "select": {},
            "store": "a",
            "allow_off_policy": True,
        },
        "less": {"problems": {}},
        "unused": {"problems": {}},
    }
    found = idle("traces:own@1", sources=sources, store="s")
    assert {
        "traces.store",
        "traces.problems",
        "traces.sampling",
        "traces.select",
        "traces.sources.unused",
    } <= found
    assert "traces.sources.own.allow_off_policy" not in found
    found = idle("traces:own@0.5, prompts:less@0.5", sources=sources)
    assert "traces.sampling" not in found  # less has none of its own
    assert {"traces.sampling.temperature", "traces.select", "traces.sources.less.store"} <= found
    found = idle("traces:less@1", sources=sources, allow_off_policy=True)
    assert {
        "traces.allow_off_policy",
        "traces.sources.less.allow_off_policy",
    } <= found  # a default store is its own


@pytest.mark.parametrize(
    ("traces", "expected"),
    [
        ({"sampling": {"temperature": 0}}, {"sampling.top_p", "sampling.top_k"}),
        ({"sampling": {"template": "none"}}, {"sampling.thinking"}),
        ({"engine": {"base_urls": ["http://a"]}}, {"sampling.batch_size"}),
        ({"sampling": {"max_new_tokens": 10}, "select": {"max_tokens": 10}}, {"select.max_tokens"}),
        ({"sampling": {"max_new_tokens": 10}, "select": {"max_tokens": 9}}, set()),
        ({"select": {"per_problem": 1}}, {"select.per_problem"}),
        ({"sampling": {"samples_per_problem": 2}, "select": {"per_problem": 1}}, set()),
        # another model's store may hold more than these settings sample
        ({"store": "s", "allow_off_policy": True, "select": {"per_problem": 1}}, set()),
    ],
)
def test_within_sampling_and_selection(traces, expected):
    always = {"problems.split", "select.least_share", "retry_failed", "allow_off_policy"}
    found = {
        name.removeprefix("traces.")
        for name in idle("traces@1", **traces)
        if name.startswith("traces")
    }
    assert found - always == expected
