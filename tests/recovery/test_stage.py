"""Which traces recovery uses, and what it refuses before it starts."""

import pytest

from rac_modifier import RacError
from rac_modifier.distributed.processes import ALONE
from rac_modifier.recovery.stage import RecoveryStage, split_traces
from rac_modifier.settings.recovery import RecoverySettings
from rac_modifier.traces.records import Trace
from rac_modifier.traces.store import TraceStore
from tests.tiny import tiny_model

RECOVER = {"tokens": 600, "held_out_tokens": 150, "step_tokens": 100, "batch_tokens": 400}
RECOVER["learning_rate"] = 1e-3


def test_a_model_on_two_devices_is_refused():
    model = tiny_model()
    model.lm_head.to("meta")
    with pytest.raises(RacError, match="the weights are on cpu, meta, and training needs them on"):
        RecoveryStage(model, RecoverySettings(**RECOVER), ALONE, quantizes=False, keep=False)


def test_a_folder_with_other_files_is_refused_since_it_would_be_removed(tmp_path):
    settings = RecoverySettings(**RECOVER, folder=str(tmp_path))
    for ours in ("recovery.safetensors", "own_answers.json", ".lock", ".recovery.x1.tmp"):
        (tmp_path / ours).touch()
    (tmp_path / "teacher").mkdir()
    RecoveryStage(tiny_model(), settings, ALONE, quantizes=False, keep=False)
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(RacError, match=r"holds other files \('thesis.tex'\), and it is removed"):
        RecoveryStage(tiny_model(), settings, ALONE, quantizes=False, keep=False)


def test_a_folder_that_cannot_be_removed_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in (".", "a/..", "/"):
        settings = RecoverySettings(**RECOVER, folder=folder)
        with pytest.raises(RacError, match=f"'{folder}' could not be removed at the end"):
            RecoveryStage(tiny_model(), settings, ALONE, quantizes=False, keep=False)


def test_an_own_answer_that_is_a_training_trace_is_left_out(trace_store, tmp_path):
    """A quantized model gives many of the dense model's greedy answers."""
    settings, model = RecoverySettings(**RECOVER, folder=str(tmp_path / "kept")), tiny_model()
    stage = RecoveryStage(model, settings, ALONE, quantizes=False, keep=False)
    stage.read_dense(
        model, list(TraceStore.read(trace_store))[:20], lambda training, _: [*training[:2]]
    )
    assert not set(stage.held_out) & set(stage._training)


def test_logits_that_are_scaled_after_the_head_are_refused_before_anything_is_sampled():
    def scaled(_model, _args, output):
        output.logits = output.logits / 8  # as Granite does
        return output

    model = tiny_model()
    model.register_forward_hook(scaled)
    with pytest.raises(RacError, match="changes its logits after the output head"):
        RecoveryStage(model, RecoverySettings(**RECOVER), ALONE, quantizes=False, keep=False)


def test_traces_are_split_by_problem(trace_store):
    traces = list(TraceStore.read(trace_store))[:40]
    held_out, training = split_traces(traces, 200)
    assert len(held_out) + len(training) == len(traces)
    assert sum(len(ids) for ids, _ in held_out[:-1]) < 200 <= sum(len(ids) for ids, _ in held_out)
    with pytest.raises(RacError, match=r"none is left to train on; raise recover\.tokens"):
        split_traces(traces, 10**9)


def test_a_question_under_another_id_and_in_another_mode_is_held_out_too():
    def trace(problem, prompt):
        return Trace(f"{problem}#0", problem, prompt, (7, 8, 9), "stop", 0, "?", None)

    first, twice, other_mode, free = (
        trace("row0", (1, 2)), trace("row9", (1, 2)), trace("row0", (1, 3)), trace("row1", (1, 4)),
    )  # fmt: skip
    held_out, training = split_traces([first, free, twice, other_mode], 1)
    assert [ids[:prompt] for ids, prompt in held_out] == [(1, 2), (1, 2), (1, 3)]
    assert [ids[:prompt] for ids, prompt in training] == [(1, 4)]


def test_what_decides_has_no_copies_and_what_is_trained_on_a_few():
    traces = [
        Trace(f"{i}#0", str(i), (1, i), (i, *(7, 8) * 99), "length", 0, "?", None) for i in range(3)
    ]
    held_out, training = split_traces(traces, 8)
    assert held_out == [((1, i, i, 7, 8), 2) for i in (0, 1)]
    assert training == [((1, 2, 2, *(7, 8) * 33), 2)]
