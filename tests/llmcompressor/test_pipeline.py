"""Our pipeline is in place from initializing to finalizing, and decides group by group or layer by layer."""

import threading

import pytest
from llmcompressor.core import active_session, create_session
from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
from llmcompressor.pipelines.registry import CalibrationPipeline
from llmcompressor.pipelines.sequential.pipeline import SequentialPipeline

from rac_modifier import RacError
from rac_modifier.llmcompressor import plan
from rac_modifier.llmcompressor.pipeline import (
    ReasoningAwareSequentialPipeline,
    SessionRun,
    put_in_place,
    take_away,
)
from rac_modifier.llmcompressor.plan import UntraceableError
from tests.llmcompressor.modifier_helpers import assert_same_weights, gptq_w4, weights
from tests.tiny import TOKENS, linears


def loaded() -> type:
    """The class of the pipeline that upstream would run now."""
    return type(CalibrationPipeline.from_modifiers([gptq_w4()]))


def test_it_is_in_place_for_its_session_only():
    with create_session() as ours:
        assert loaded() is SequentialPipeline
        put_in_place(ours, SessionRun(None))
        assert loaded() is ReasoningAwareSequentialPipeline
        with create_session():
            assert loaded() is SequentialPipeline
        seen = []
        thread = threading.Thread(
            target=lambda: seen.append(loaded())
        )  # which has the global session
        thread.start()
        thread.join()
        assert seen == [SequentialPipeline]
        assert take_away(ours)
        assert loaded() is SequentialPipeline
        assert not take_away(ours)


def test_the_end_of_one_run_leaves_another_in_place():
    with create_session() as first, create_session() as second:
        put_in_place(first, SessionRun(None))
        put_in_place(second, SessionRun(None))
        take_away(first)
        assert loaded() is ReasoningAwareSequentialPipeline
        take_away(second)
        assert loaded() is SequentialPipeline


def test_an_error_in_the_pipeline_takes_it_away_at_once(prune, monkeypatch):
    def fails(*args):
        assert loaded() is ReasoningAwareSequentialPipeline
        raise RuntimeError("out of memory")

    monkeypatch.setattr(plan, "trace_groups", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        prune()
    assert loaded() is SequentialPipeline


def test_an_error_of_another_modifier_is_cleared_by_the_next_reset(prune, monkeypatch):
    def fails(self, state, **kwargs):
        raise ValueError("no such scheme")

    monkeypatch.setattr(QuantizationModifier, "on_initialize", fails)
    with pytest.raises(ValueError, match="no such scheme"):
        prune(later=[QuantizationModifier(targets=["Linear"], scheme="FP8_DYNAMIC")])
    measured = []
    monkeypatch.setattr(
        "rac_modifier.llmcompressor.calibration_modifier.RunDivergence.measure", measured.append
    )
    active_session().reset()
    assert loaded() is SequentialPipeline
    assert measured == []  # there is no result to measure


@pytest.mark.parametrize("name", ["independent", "sequential"])
def test_a_later_modifier_calibrates_on_the_same_tokens_without_padding(
    calibrate, monkeypatch, name
):
    seen = []
    original = GPTQModifier.calibrate_module

    def spy(self, module, args, output):
        if module.weight.shape == (64, 128):  # down_proj, once per layer
            seen.append(args[0].shape[:-1])
        return original(self, module, args, output)

    monkeypatch.setattr(GPTQModifier, "calibrate_module", spy)
    calibrate(
        later=[GPTQModifier(targets=["Linear"], ignore=["lm_head"], scheme="W8A8")], pipeline=name
    )
    assert {shape[0] for shape in seen} == {1}  # one sequence per batch: nothing to pad
    assert sum(shape[1] for shape in seen) == 2 * TOKENS


def test_both_pipelines_prune_alike(prune):
    assert_same_weights(
        weights(prune(pipeline="independent")), weights(prune(pipeline="sequential"))
    )


def test_basic_is_refused(prune):
    with pytest.raises(RacError, match='pipeline="basic" does not prune layer by layer'):
        prune(pipeline="basic")


def test_token_weights_decide_what_is_kept(prune):
    prompts_free = prune(calibration={"tokens": TOKENS, "prompt_weight": 0.0})
    pairs = zip(linears(prompts_free).values(), linears(prune()).values(), strict=True)
    assert any(not a.weight.equal(b.weight) for a, b in pairs)


@pytest.fixture
def untraceable(monkeypatch):
    def fails(*args, **kwargs):
        raise UntraceableError("tracing failed: a loop over experts")

    monkeypatch.setattr(plan, "trace_groups", fails)


@pytest.mark.usefixtures("untraceable")
def test_auto_prunes_layer_by_layer_where_it_must_and_records_why(prune, record_of):
    assert record_of(prune)["order"] == {
        "order": "layer",
        "why": "tracing failed: a loop over experts",
        "reconstruct": "pruned",
    }


@pytest.mark.usefixtures("untraceable")
def test_group_is_refused_where_it_is_not_possible(prune):
    with pytest.raises(
        RacError, match=r"order: group is not possible here: tracing failed.*set order: layer"
    ):
        prune(order="group")


def test_beside_another_modifier_in_one_pass_it_prunes_layer_by_layer(prune, record_of):
    later = QuantizationModifier(targets=["Linear"], ignore=["lm_head"], scheme="FP8_DYNAMIC")
    order = record_of(prune, later=[later], pipeline="sequential", reconstruct="pruned")["order"]
    assert (order["order"], order["why"]) == (
        "layer",
        "other modifiers calibrate in the same pass (pipeline='sequential')",
    )
