"""The loop's state: what a full disk costs, what is left when a run has ended; how often it checks. The rest: test_distill.py."""

import re

import pytest
import torch
from loguru import logger

from rac_modifier.errors import RacError
from rac_modifier.recovery import training_loop
from rac_modifier.recovery.distill import recover
from rac_modifier.recovery.training_loop import TrainingLoop
from rac_modifier.settings.recovery import RecoverySettings
from tests.recovery.recovery_helpers import LiveTeacher, dense_and_sparse, sequences

SETTINGS = RecoverySettings(learning_rate=3e-3, step_tokens=300, batch_tokens=400)


def run(model, dense, settings=SETTINGS, **options):
    training, held_out = sequences(40, seed=1), sequences(10, seed=2)
    return recover(
        model, LiveTeacher(dense), training, held_out, settings, progress=False, **options
    )


@pytest.fixture
def lines():
    texts: list[str] = []
    handler = logger.add(lambda message: texts.append(message.record["message"]), level="INFO")
    yield texts
    logger.remove(handler)


def test_a_log_file_shows_step_loss_and_time_left(lines):
    dense, model = dense_and_sparse()
    training, held_out = sequences(40, seed=1), sequences(10, seed=2)
    result = recover(model, LiveTeacher(dense), training, held_out, SETTINGS)
    steps = [line for line in lines if line.startswith("recovery: step ")]
    assert len(steps) == min(result.steps, 10) > 1
    form = r"recovery: step \d+ of \d+, loss 0\.\d{4}, held-out KL 0\.\d{4} \(before: 0\.\d{4}\), "
    assert all(re.fullmatch(form + r"about \d+ s left", line) for line in steps)


def test_a_disk_that_is_full_for_a_while_does_not_end_the_training(tmp_path, monkeypatch, lines):
    dense, undisturbed = dense_and_sparse()
    expected = run(undisturbed, dense)
    calls = 0
    save = training_loop.save_state

    def full_at_first(*args):
        nonlocal calls
        calls += 1
        if calls < 3:
            raise RacError("no room")
        save(*args)

    monkeypatch.setattr(training_loop, "save_state", full_at_first)
    _, model = dense_and_sparse()
    result = run(model, dense, state=tmp_path, save_seconds=0.0)
    assert calls > 3
    assert sum("training goes on without a new state: no room" in text for text in lines) == 2
    assert result.curve == expected.curve
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), undisturbed.parameters(), strict=True)
    )
    assert (tmp_path / "recovery.safetensors").exists()


@pytest.mark.parametrize(
    "changes", [{}, {"activation_checkpointing": True}, {"folder": "elsewhere"}], ids=str
)
def test_after_the_end_nothing_is_trained_again(tmp_path, monkeypatch, changes):
    """Also with settings that change no result."""
    dense, first = dense_and_sparse()
    expected = run(
        first, dense, state=tmp_path
    )  # no state before the end: five minutes are not over
    steps = []
    step = TrainingLoop.step
    monkeypatch.setattr(TrainingLoop, "step", lambda *args: (steps.append(1), step(*args))[1])
    _, model = dense_and_sparse()
    result = run(model, dense, SETTINGS.model_copy(update=changes), state=tmp_path)
    assert steps == []
    assert (result.curve, result.kl_after, result.kept) == (
        expected.curve,
        expected.kl_after,
        expected.kept,
    )
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), first.parameters(), strict=True)
    )


@pytest.mark.parametrize(
    ("training", "held_out", "checks"),
    [(3, 40, 2), (40, 40, 2), (120, 10, 4), (200, 2, 8)],
    ids=["short run", "as much as is held out", "twelve times as much", "long run"],
)
def test_checks_take_about_a_tenth_of_the_time(training, held_out, checks):
    """A check is one forward pass over the held-out traces, a step about three over its own; two to eight checks."""
    dense, model = dense_and_sparse()
    settings = RecoverySettings(learning_rate=3e-3, step_tokens=64)
    traces = sequences(training, seed=1), sequences(held_out, seed=2)
    result = recover(model, LiveTeacher(dense), *traces, settings, progress=False)
    assert len(result.curve) == 1 + min(checks, result.steps)
