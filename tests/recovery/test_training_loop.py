"""The loop's state on a full disk and after the end, and how often it checks."""

from types import SimpleNamespace

import pytest
import torch

from rac_modifier.distributed.processes import Processes
from rac_modifier.errors import RacError
from rac_modifier.recovery import training_loop
from rac_modifier.recovery.state import Progress
from rac_modifier.recovery.student import Student
from rac_modifier.recovery.training_loop import TrainingLoop, plan_steps
from rac_modifier.settings.recovery import RecoverySettings
from tests.meeting import together
from tests.recovery.recovery_helpers import (
    SETTINGS,
    LiveTeacher,
    assert_same_weights,
    dense_and_sparse,
    kl_of,
    run,
    sequences,
)

HELD_OUT = sequences(1, seed=2)


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """The result of a run, its model and its folder."""
    folder, saves = tmp_path_factory.mktemp("ended"), []
    save = Progress.save
    dense, model = dense_and_sparse()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Progress, "save", lambda *args: saves.append(save(*args)))
        result = run(model, dense, state=folder)
    assert len(saves) == 1, "at the end: the run was shorter than 5 minutes"
    return result, model, folder


def test_a_disk_that_is_full_for_a_while_does_not_end_the_training(ended, tmp_path, monkeypatch):
    calls, save = [], Progress.save

    def full_at_first(*args):
        calls.append(1)
        if len(calls) < 3:
            raise RacError("no room")
        save(*args)

    monkeypatch.setattr(Progress, "save", full_at_first)
    monkeypatch.setattr(training_loop, "_SAVE_SECONDS", 0.0)
    dense, model = dense_and_sparse()
    result = run(model, dense, state=tmp_path)
    assert len(calls) > 3
    assert result.curve == ended[0].curve
    assert_same_weights(model, ended[1])
    assert (tmp_path / "recovery.safetensors").exists()


@pytest.mark.parametrize(
    "changes", [{}, {"activation_checkpointing": True}, {"folder": "elsewhere"}], ids=str
)
def test_after_the_end_nothing_is_trained_again(ended, monkeypatch, changes):
    """Also with settings that change no result."""
    monkeypatch.setattr(TrainingLoop, "step", lambda *args: pytest.fail("trained again"))
    dense, model = dense_and_sparse()
    result = run(model, dense, SETTINGS.model_copy(update=changes), state=ended[2])
    assert (result.curve, result.kept) == (ended[0].curve, ended[0].kept)
    assert_same_weights(model, ended[1])


@pytest.mark.parametrize(
    ("counts", "checks"), [((3, 40), 2), ((40, 40), 2), ((120, 10), 4), ((200, 2), 8)]
)
def test_checks_take_about_a_tenth_of_the_time(counts, checks):
    """A check is a forward pass over the held-out traces, a step about three over its own."""
    dense, model = dense_and_sparse()
    result = run(model, dense, RecoverySettings(learning_rate=3e-3, step_tokens=64), counts)
    assert len(result.curve) == 1 + min(checks, result.steps)


def gradients(dense, model, processes):
    """The loss of a step on one sequence, its gradient, and the held-out KL on the same."""
    student, seen = Student(model, dict(model.named_parameters()), processes), []
    (step,) = plan_steps(HELD_OUT, SETTINGS, torch.device("cpu"), 1)
    loop = TrainingLoop(student, LiveTeacher(dense), HELD_OUT, {}, None, [step], [1e-3], None)
    loop.optimizer = SimpleNamespace(
        step=lambda: seen.extend(p.grad.clone() for p in model.model.layers.parameters()),
        zero_grad=lambda **options: None,
    )
    loss = loop.step(step)
    return loss, seen, loop.check(Progress("key"))


def test_a_rank_without_a_sequence_adds_nothing(monkeypatch):
    """The gradient of the other one is doubled, since FSDP takes the mean over both."""
    monkeypatch.setattr(training_loop, "_CLIP", 1e9)
    alone, *pairs = (dense_and_sparse() for _ in range(3))
    expected, alone = kl_of(*alone, HELD_OUT), gradients(*alone, Processes())
    first, second = together(2, lambda processes: gradients(*pairs[processes.rank], processes))
    for loss, _, kl in (alone, first, second):
        assert [loss, kl] == pytest.approx([expected, expected], rel=1e-4)
    torch.testing.assert_close([x / 2 for x in first[1]], alone[1])
    assert not any(bool(x.any()) for x in second[1])


def test_the_gradient_of_a_step_is_clipped(monkeypatch):
    norms, step = [], torch.optim.AdamW.step

    def recorded(optimizer):
        of = [parameter.grad for parameter in optimizer.param_groups[0]["params"]]
        norms.append(torch.nn.utils.get_total_norm(of).item())
        step(optimizer)

    monkeypatch.setattr(torch.optim.AdamW, "step", recorded)
    for scale in (1, 8):
        dense, model = dense_and_sparse()
        for head in (dense.lm_head, model.lm_head):
            head.weight.data.mul_(scale)
        run(model, dense, counts=(10, 5))
    assert 0.1 < norms[0] < 0.9
    assert norms[1] == pytest.approx(1.0, abs=1e-3)
