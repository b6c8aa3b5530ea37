"""The whole loop on a tiny model: what is trained, what is kept, and what a kill costs."""

import copy
import json
import math
import time

import pytest
import torch

from rac_modifier.errors import RacError
from rac_modifier.recovery import distill, training_loop
from rac_modifier.recovery.training_loop import TrainingLoop
from tests.recovery.recovery_helpers import (
    SETTINGS,
    Killed,
    LiveTeacher,
    assert_same_weights,
    dense_and_sparse,
    kl_of,
    run,
    sequences,
)
from tests.tiny import linears, tiny_gemma

COUNTS = (120, 20)
HELD_OUT = sequences(20, seed=2)


def changed(**changes):
    return SETTINGS.model_copy(update=changes)


@pytest.fixture(scope="module")
def undisturbed():
    """The result and the model of a run of SETTINGS; its masks were checked after each step."""
    dense, sparse = dense_and_sparse()
    zeros = {name: p.detach() == 0 for name, p in sparse.named_parameters() if "proj" in name}
    step = TrainingLoop.step

    def checked(self, *args):
        loss = step(self, *args)
        assert all(torch.equal(self.parameters[name] == 0, zero) for name, zero in zeros.items())
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingLoop, "step", checked)
        return run(sparse, dense, counts=COUNTS), sparse


def test_the_sparse_model_moves_towards_the_dense_one_and_no_zero_moves(undisturbed):
    result, sparse = undisturbed
    dense, start = dense_and_sparse()
    assert result.kl_before == pytest.approx(kl_of(dense, start, HELD_OUT), rel=1e-5)
    assert result.kl_after == pytest.approx(kl_of(dense, sparse, HELD_OUT), rel=1e-4)
    assert result.kl_after < 0.85 * result.kl_before
    assert result.kept == f"after step {min(result.curve, key=lambda point: point[1])[0]}"
    after = sparse.state_dict()
    for name, weight in start.state_dict().items():
        assert torch.equal(after[name] == 0, weight == 0), name
        assert torch.equal(after[name], weight) == ("embed" in name or "lm_head" in name), name
    assert all(p.grad is None and p.requires_grad for p in sparse.parameters())
    tokens = sum(len(ids) for ids, _ in sequences(COUNTS[0], seed=1))
    assert tokens - SETTINGS.step_tokens / 2 < result.tokens <= tokens  # less the rest of a pass
    json.dumps(result.as_dict(), allow_nan=False)


def test_bfloat16_weights_are_trained_in_float32_and_come_back():
    dense, sparse = dense_and_sparse()
    start = time.monotonic()
    result = run(sparse.to(torch.bfloat16), dense.to(torch.bfloat16), counts=COUNTS)
    assert 0 < result.seconds <= time.monotonic() - start
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
    before = copy.deepcopy(sparse)
    result = run(sparse, dense, changed(**changes))
    assert result.stopped.startswith(stopped)
    assert result.kept == "before"
    assert result.kl_after == result.kl_before
    assert_same_weights(sparse, before)
    json.dumps(result.as_dict(), allow_nan=False)


def test_what_cannot_be_trained_is_refused():
    dense, sparse = dense_and_sparse()
    broken = copy.deepcopy(dense)
    broken.model.norm.weight.data[3] = torch.nan
    with pytest.raises(RacError, match="computes logits that are not finite"):
        run(broken, dense)
    with pytest.raises(RacError, match="the held-out KL before training is nan"):
        run(sparse, broken)
    with pytest.raises(RacError, match="1 held-out traces are among the training traces"):
        run(sparse, dense, training=[*sequences(9, seed=1), HELD_OUT[3]], held_out=HELD_OUT)


def test_a_default_learning_rate_that_diverges_is_lowered(monkeypatch):
    """With the same steps and a new AdamW; the best weights of all tries are kept."""
    tries, step = [], torch.optim.AdamW.step

    def recorded(optimizer):
        (group,) = optimizer.param_groups
        assert (group["betas"], group["weight_decay"]) == ((0.9, 0.95), 0.0)
        if not optimizer.state:
            tries.append([])
        tries[-1].append(group["lr"])
        step(optimizer)

    monkeypatch.setattr(torch.optim.AdamW, "step", recorded)
    monkeypatch.setattr(distill, "default_learning_rate", lambda parameters: 0.3)
    dense, sparse = dense_and_sparse()
    result = run(sparse, dense, changed(learning_rate=None), counts=COUNTS)
    assert result.tries == 2
    assert len(tries[2]) == result.steps
    for rate, taken in zip((0.3, 0.1, 0.1 / 3), tries, strict=True):
        expected = [rate * (1 - 0.1 * step) for step in range(10)]  # of ten steps
        assert taken == pytest.approx(expected[: len(taken)])
    assert result.learning_rate == pytest.approx(0.3 / 9)
    assert [step for step, _ in result.curve].count(0) == 1
    assert result.kl_after == pytest.approx(kl_of(dense, sparse, HELD_OUT), rel=1e-4)
    assert result.kl_after == min(kl for _, kl in result.curve)


def test_the_next_learning_rate_goes_on_from_the_best_weights(monkeypatch):
    dense, sparse = dense_and_sparse()
    step, train, begins = TrainingLoop.step, TrainingLoop._train_at, []

    def broken(self, *args):
        loss = step(self, *args)
        return math.nan if len(begins) == 1 and args[0] is self.steps[-1] else loss

    def begun(self, rate, progress):
        begins.append((kl_of(dense, self.model, HELD_OUT), progress.best_kl))
        train(self, rate, progress)

    monkeypatch.setattr(TrainingLoop, "step", broken)
    monkeypatch.setattr(TrainingLoop, "_train_at", begun)
    assert run(sparse, dense, changed(learning_rate=None), counts=COUNTS).tries == 1
    (first, _), (second, best) = begins
    assert second == pytest.approx(best, rel=1e-4)
    assert second < first


@pytest.mark.parametrize(("rise", "stopped"), [(1.49, False), (1.51, True)])
def test_a_rate_is_too_high_where_the_kl_rises_by_more_than_a_half(monkeypatch, rise, stopped):
    def check(self, progress):
        kl = 0.2 * (rise if progress.curve else 1.0)
        progress.curve.append((progress.step, kl))
        progress.best_kl = min(progress.best_kl, kl)
        return kl

    monkeypatch.setattr(TrainingLoop, "check", check)
    dense, sparse = dense_and_sparse()
    assert bool(run(sparse, dense, counts=(9, 3)).stopped) == stopped


def test_a_loss_that_is_not_finite_stops_and_keeps_the_best(undisturbed, monkeypatch):
    dense, sparse = dense_and_sparse()
    step, last, taken = TrainingLoop.step, undisturbed[0].steps, []

    def broken(self, *args):
        taken.append(1)
        return math.nan if len(taken) == last else step(self, *args)

    monkeypatch.setattr(TrainingLoop, "step", broken)
    result = run(sparse, dense, counts=COUNTS)
    assert result.stopped.startswith(f"the loss of step {last} is nan")
    assert result.kl_after == pytest.approx(kl_of(dense, sparse, HELD_OUT), rel=1e-4)
    assert result.kl_after < result.kl_before


def test_killed_runs_end_as_an_undisturbed_one(undisturbed, tmp_path, monkeypatch):
    expected, model_of_it = undisturbed
    step, calls = TrainingLoop.step, []

    def counted(self, *args):
        calls.append(1)
        if calls == [1] * kill_at:
            raise Killed
        return step(self, *args)

    monkeypatch.setattr(TrainingLoop, "step", counted)
    monkeypatch.setattr(training_loop, "_SAVE_SECONDS", 0.0)
    options = {"counts": COUNTS, "state": tmp_path}
    for kill_at in (3, 4, 2):  # noqa: B007 - read in `counted`
        calls.clear()
        with pytest.raises(Killed):
            run(*dense_and_sparse()[::-1], **options)
    calls.clear()
    kill_at = -1
    dense, model = dense_and_sparse()
    result = run(model, dense, **options)
    assert 0 < len(calls) < expected.steps  # it went on, and did not start again
    for name in ("curve", "kept", "steps"):
        assert getattr(result, name) == getattr(expected, name)
    assert_same_weights(model, model_of_it)


@pytest.mark.parametrize(
    "changes",
    [
        {"settings": changed(passes=2)},
        {"training": [*sequences(39, seed=1), *sequences(1, seed=9)]},
        {"held_out": sequences(10, seed=8)},
        {"weights": 1.5},
        {"autocast": torch.bfloat16},
        {"teacher": LiveTeacher(dense_and_sparse(seed=1)[0])},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_state_of_another_run_is_not_used(tmp_path, monkeypatch, changes):
    dense, sparse = dense_and_sparse()
    traces = {"training": sequences(40, seed=1), "held_out": sequences(10, seed=2)}
    options = {"teacher": LiveTeacher(dense), "settings": SETTINGS, "state": tmp_path, **traces}
    distill.recover(sparse, **options)
    steps, step = [], TrainingLoop.step
    monkeypatch.setattr(TrainingLoop, "step", lambda *args: (steps.append(1), step(*args))[1])
    _, other = dense_and_sparse()
    other.model.norm.weight.data.mul_(changes.pop("weights", 1.0))
    result = distill.recover(other, **{**options, **changes})
    assert len(steps) == result.steps > 0


def test_a_model_in_bfloat16_whose_norms_keep_their_dtype_is_recovered():
    dense = tiny_gemma().to(torch.bfloat16)
    sparse = copy.deepcopy(dense)
    for linear in linears(sparse).values():
        weight = linear.weight.data
        weight[weight.abs() < weight.abs().median()] = 0.0
    result = run(sparse, dense, counts=(30, 5))
    assert result.kl_after < result.kl_before
    assert {p.dtype for p in sparse.parameters()} == {torch.bfloat16}
