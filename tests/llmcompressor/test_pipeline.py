"""Our pipeline is in place from initializing to finalizing, and decides the order of a run."""

import threading

import pytest
from llmcompressor.core import active_session, create_session
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.pipelines.registry import CalibrationPipeline
from llmcompressor.pipelines.sequential.pipeline import SequentialPipeline

from rac_modifier import RacError
from rac_modifier.llmcompressor import plan
from rac_modifier.llmcompressor.pipeline import (
    ReasoningAwareSequentialPipeline,
    SessionRun,
    install_pipeline,
    remove_pipeline,
)
from rac_modifier.llmcompressor.plan import UntraceableError
from tests.llmcompressor.conftest import BUILD, fp8, record_of
from tests.llmcompressor.modifier_helpers import assert_same_weights, gptq_w4, weights


def loaded() -> type:
    """The class of the pipeline that upstream would run now."""
    return type(CalibrationPipeline.from_modifiers([gptq_w4()]))


def test_it_is_in_place_for_its_session_only():
    with create_session() as ours, create_session() as second:
        assert loaded() is SequentialPipeline
        install_pipeline(second, SessionRun(None, None))
        install_pipeline(ours, SessionRun(None, None))
        assert loaded() is ReasoningAwareSequentialPipeline
        with create_session():
            assert loaded() is SequentialPipeline
        seen = []
        thread = threading.Thread(target=lambda: seen.append(loaded()))  # has the global session
        thread.start()
        thread.join()
        assert seen == [SequentialPipeline]
        assert remove_pipeline(ours)
        assert loaded() is ReasoningAwareSequentialPipeline, "another run goes on"
        assert remove_pipeline(second)
        assert loaded() is SequentialPipeline
        assert not remove_pipeline(ours)


def test_an_error_in_the_pipeline_takes_it_away(prune, monkeypatch):
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

    measured = []
    monkeypatch.setattr(QuantizationModifier, "on_initialize", fails)
    measure = BUILD.replace("build_calibration_set", "RunDivergence.measure")
    monkeypatch.setattr(measure, measured.append)
    with pytest.raises(ValueError, match="no such scheme"):
        prune(later=[fp8()])
    active_session().reset()
    assert loaded() is SequentialPipeline
    assert measured == []  # there is no result to measure


def test_layer_by_layer_where_it_must_be_and_the_record_says_why(prune, tmp_path, monkeypatch):
    def fails(*args, **kwargs):
        raise UntraceableError("tracing failed: a loop over experts")

    monkeypatch.setattr(plan, "trace_groups", fails)
    model = prune(output_dir=tmp_path / "out", solver="sparsegpt")
    assert record_of(tmp_path / "out")["order"] == {
        "order": "layer",
        "why": "tracing failed: a loop over experts",
        "reconstruct": "pruned",
    }
    settings = {"order": "layer", "reconstruct": "pruned", "solver": "sparsegpt"}
    assert_same_weights(weights(model), weights(prune(**settings)))
    with pytest.raises(RacError, match=r"order: group is not possible here: .*set order: layer"):
        prune(order="group")
