"""The whole loop on a tiny model: what is trained, what is not, what is kept, and what a kill costs."""

import copy
import json
import math

import pytest
import torch

from rac_modifier.errors import RacError
from rac_modifier.recovery import distill
from rac_modifier.recovery.distill import recover
from rac_modifier.recovery.training_loop import TrainingLoop
from rac_modifier.settings.recovery import RecoverySettings
from tests.recovery.recovery_helpers import LiveTeacher, dense_and_sparse, kl_of, sequences

SETTINGS = RecoverySettings(learning_rate=3e-3, step_tokens=300, batch_tokens=400, tokens=4000)
TRAINING, HELD_OUT = sequences(120, seed=1), sequences(20, seed=2)


def run(model, dense, settings=SETTINGS, **options):
    return recover(
        model, LiveTeacher(dense), TRAINING, HELD_OUT, settings, progress=False, **options
    )


def test_the_sparse_model_moves_towards_the_dense_one_and_no_zero_moves():
    dense, sparse = dense_and_sparse()
    before, dense_before = copy.deepcopy(sparse.state_dict()), copy.deepcopy(dense.state_dict())
    result = run(sparse, dense)
    assert result.kl_before == pytest.approx(
        kl_of(dense, dense_and_sparse()[1], HELD_OUT), rel=1e-4
    )
    assert result.kl_after == pytest.approx(kl_of(dense, sparse, HELD_OUT), rel=1e-4)
    assert result.kl_after < 0.85 * result.kl_before
    assert result.kept == f"after step {min(result.curve, key=lambda point: point[1])[0]}"
    after = sparse.state_dict()
    for name, weight in before.items():
        if "embed" in name or "lm_head" in name:
            assert torch.equal(after[name], weight), name
        elif "proj" in name:
            assert torch.equal(after[name] == 0, weight == 0), name
            assert not torch.equal(after[name], weight), name
        elif "norm" in name:
            assert not torch.equal(after[name], weight), name
    assert all(
        torch.equal(dense.state_dict()[name], weight) for name, weight in dense_before.items()
    )
    assert all(p.grad is None and p.requires_grad for p in sparse.parameters())
    json.dumps(result.as_dict(), allow_nan=False)


def test_after_every_step_the_mask_holds(monkeypatch):
    dense, sparse = dense_and_sparse()
    zeros = {name: p.detach() == 0 for name, p in sparse.named_parameters() if "proj" in name}
    steps = 0
    step = TrainingLoop.step

    def checked(self, *args):
        nonlocal steps
        loss = step(self, *args)
        steps += 1
        assert all(torch.equal(self.parameters[name] == 0, zero) for name, zero in zeros.items())
        return loss

    monkeypatch.setattr(TrainingLoop, "step", checked)
    assert run(sparse, dense).steps == steps > 8


def test_bfloat16_weights_are_trained_in_float32_and_come_back():
    dense, sparse = dense_and_sparse()
    sparse.to(torch.bfloat16)
    result = run(sparse, dense.to(torch.bfloat16))
    assert {p.dtype for p in sparse.parameters()} == {torch.bfloat16}
    assert result.kl_after < 0.9 * result.kl_before


@pytest.mark.parametrize(
    ("changes", "stopped"),
    [
        ({"learning_rate": 30.0}, "held-out KL "),
        ({"learning_rate": 1e308}, "the loss of step 2 is nan at learning rate 1e+308"),
        ({"learning_rate": 1e308, "step_tokens": 10_000}, "held-out KL nan"),
    ],
)
def test_training_that_diverges_ends_with_a_record_and_the_weights_of_before(changes, stopped):
    dense, sparse = dense_and_sparse()
    before = copy.deepcopy(sparse.state_dict())
    result = run(sparse, dense, SETTINGS.model_copy(update=changes))
    assert result.stopped.startswith(stopped)
    assert result.kept == "before"
    assert result.kl_after == result.kl_before
    assert all(torch.equal(sparse.state_dict()[name], weight) for name, weight in before.items())
    json.dumps(result.as_dict(), allow_nan=False)


def test_a_model_that_computes_nan_is_refused_before_training():
    dense, sparse = dense_and_sparse()
    broken = copy.deepcopy(dense)
    broken.model.norm.weight.data[3] = torch.nan
    with pytest.raises(RacError, match="computes logits that are not finite"):
        run(broken, dense)
    with pytest.raises(RacError, match="the held-out KL before training is nan"):
        run(sparse, broken)


def test_a_default_learning_rate_that_diverges_is_lowered(monkeypatch):
    """From the start again, with the same steps; the weights that are kept are the best of all tries."""
    monkeypatch.setattr(distill, "default_learning_rate", lambda parameters: 0.3)
    dense, sparse = dense_and_sparse()
    result = run(sparse, dense, SETTINGS.model_copy(update={"learning_rate": None}))
    assert result.tries == 2
    assert result.learning_rate == pytest.approx(0.3 / 9)
    assert [step for step, _ in result.curve].count(0) == 1
    assert result.kl_after == pytest.approx(kl_of(dense, sparse, HELD_OUT), rel=1e-4)
    assert result.kl_after == min(kl for _, kl in result.curve)


@pytest.fixture(scope="module")
def undisturbed():
    """The result and the model of a run of SETTINGS."""
    dense, model = dense_and_sparse()
    return run(model, dense), model


def test_a_loss_that_is_not_finite_stops_and_keeps_the_best(undisturbed, monkeypatch):
    dense, sparse = dense_and_sparse()
    last = undisturbed[0].steps
    step, taken = TrainingLoop.step, 0

    def broken(self, *args):
        nonlocal taken
        taken += 1
        return math.nan if taken == last else step(self, *args)

    monkeypatch.setattr(TrainingLoop, "step", broken)
    result = run(sparse, dense)
    assert result.stopped.startswith(f"the loss of step {last} is nan")
    assert result.kl_after == pytest.approx(kl_of(dense, sparse, HELD_OUT), rel=1e-4)
    assert result.kl_after < result.kl_before


def test_held_out_traces_among_the_training_traces_are_refused():
    dense, sparse = dense_and_sparse()
    with pytest.raises(RacError, match="1 held-out traces are among the training traces"):
        recover(sparse, LiveTeacher(dense), [*TRAINING, HELD_OUT[3]], HELD_OUT, SETTINGS)


class Killed(BaseException):
    """Ends a run as a kill does: nothing else runs."""


@pytest.mark.parametrize("kills", [(2,), (3, 4, 2), (2, 2, 3)])
def test_killed_runs_end_as_an_undisturbed_one(undisturbed, tmp_path, monkeypatch, kills):
    expected, model_of_it = undisturbed
    dense, _ = dense_and_sparse()
    step, calls, killed_at = TrainingLoop.step, 0, -1

    def counted(self, *args):
        nonlocal calls
        calls += 1
        if calls == killed_at:
            raise Killed
        return step(self, *args)

    monkeypatch.setattr(TrainingLoop, "step", counted)
    for killed_at in kills:  # noqa: B007 - read in `counted`
        calls = 0
        with pytest.raises(Killed):
            run(dense_and_sparse()[1], dense, state=tmp_path, save_seconds=0.0)
    calls, killed_at = 0, -1
    _, model = dense_and_sparse()
    result = run(model, dense, state=tmp_path, save_seconds=0.0)
    assert 0 < calls < expected.steps  # it went on, and did not start again
    assert result.curve == expected.curve
    assert (result.kl_after, result.kept, result.steps) == (
        expected.kl_after,
        expected.kept,
        expected.steps,
    )
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), model_of_it.parameters(), strict=True)
    )


@pytest.mark.parametrize(
    "changed", ["settings", "training", "held out", "weights", "dtype", "dense model"]
)
def test_a_state_of_another_run_is_not_used(tmp_path, changed):
    dense, sparse = dense_and_sparse()
    run(sparse, dense, state=tmp_path, save_seconds=0.0)
    _, other = dense_and_sparse()
    teacher, training, held_out, settings, autocast = dense, TRAINING, HELD_OUT, SETTINGS, None
    if changed == "settings":
        settings = SETTINGS.model_copy(update={"seed": 5})
    elif changed == "training":
        training = [*TRAINING[1:], *sequences(1, seed=9)]
    elif changed == "held out":
        held_out = sequences(20, seed=8)
    elif changed == "weights":
        other.model.norm.weight.data.mul_(1.5)
    elif changed == "dtype":
        autocast = torch.bfloat16
    else:
        teacher = dense_and_sparse(seed=1)[0]
    steps, step = [], TrainingLoop.step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingLoop, "step", lambda *args: (steps.append(1), step(*args))[1])
        result = recover(
            other,
            LiveTeacher(teacher),
            training,
            held_out,
            settings,
            progress=False,
            state=tmp_path,
            autocast=autocast,
        )
    assert len(steps) == result.steps > 0


def test_a_damaged_state_is_an_error_that_names_the_file(tmp_path):
    dense, sparse = dense_and_sparse()
    (tmp_path / "recovery.safetensors").write_bytes(b"cut")
    with pytest.raises(
        RacError, match=r"recovery\.safetensors: the state of a recovery run cannot be read"
    ):
        run(sparse, dense, state=tmp_path)
