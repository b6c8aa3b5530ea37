import pytest
import torch

from rac_modifier import RacError
from rac_modifier.calibration.loader import CalibrationLoader
from rac_modifier.calibration.mixture import CalibrationSequence, compose
from rac_modifier.calibration.token_weights import find_weighting, gradient_weights, mean_one_factor
from rac_modifier.settings.calibration import CalibrationSettings
from rac_modifier.traces.records import Trace
from tests.tiny import linears, tiny_model


@pytest.fixture
def loader():
    sequences = [CalibrationSequence(tuple(range(2, 2 + n)), 4, "traces") for n in (20, 12, 9)]
    return CalibrationLoader(sequences, compose(sequences), CalibrationSettings(batch_tokens=60), 0)


def test_weights_are_squared_output_gradients_with_a_mean_of_one(loader):
    model = tiny_model()
    names = {m: n for n, m in linears(model).items()}
    weights = gradient_weights(model, loader, names)
    real = sum(float((w > 0).sum()) for w in loader.token_weights)
    for per_batch in weights.values():
        assert [w.shape for w in per_batch] == [w.shape for w in loader.token_weights]
        assert all(float(w[own == 0].abs().sum()) == 0 for w, own in zip(per_batch, loader.token_weights, strict=True))
        assert sum(float(w.sum()) for w in per_batch) == pytest.approx(real, rel=1e-4)
        assert len({round(float(v), 6) for w in per_batch for v in w[w > 0]}) > 10  # not all alike
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_the_gradient_is_that_of_a_softened_cross_entropy(loader, monkeypatch):
    """Of the output head, whose output is the logits z: dL / dz = (softmax(z / 3) - one-hot) / 3."""
    monkeypatch.setattr(torch, "multinomial", lambda p, n, generator: p.argmax(-1, keepdim=True))
    model = tiny_model()
    (found,) = gradient_weights(model, loader, {model.lm_head: "head"}).values()
    expected = []
    for batch, own in zip(loader, loader.token_weights, strict=True):
        with torch.no_grad():
            z = model(input_ids=batch["input_ids"]).logits.double()
        one_hot = torch.nn.functional.one_hot(z.argmax(-1), z.shape[-1])
        expected.append((((z / 3).softmax(-1) - one_hot) / 3).square().sum(-1) * own)
    scale = sum(float(own.sum()) for own in loader.token_weights) / sum(float(w.sum()) for w in expected)
    for w, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(w.double(), reference * scale, rtol=1e-4, atol=1e-6)


def test_a_row_counts_the_same_whatever_it_is_batched_with(loader, monkeypatch):
    monkeypatch.setattr(
        torch, "multinomial", lambda p, n, generator: p.argmax(-1, keepdim=True)
    )  # no draw to differ by
    model = tiny_model()
    names = {model.model.layers[0].mlp.down_proj: "down"}
    (together,) = gradient_weights(model, loader, names).values()
    (alone,) = gradient_weights(model, loader.unpadded(), names).values()
    batched = torch.cat([w[own > 0] for w, own in zip(together, loader.token_weights, strict=True)]).sort().values
    single = torch.cat([w.flatten() for w in alone]).sort().values
    torch.testing.assert_close(batched, single, rtol=1e-3, atol=1e-4)


def test_a_module_that_is_not_reached_is_named(loader):
    model = tiny_model()
    with pytest.raises(RacError, match=r"spare got 0 gradients.*leave experimental.token_weights out"):
        gradient_weights(model, loader, {torch.nn.Linear(4, 4): "spare"})


def trace(length, finish="stop"):
    return Trace(f"t{length}#0", f"t{length}", (1, 2), (3,) * (length - 2), finish, 0, "?", "1")


def never(trace):
    raise AssertionError("answers are checked for `correct` only")


def test_named_weightings():
    assert find_weighting("uniform", never) is None
    assert find_weighting("inverse_length", never)(trace(20)) == 0.05
    right = find_weighting("correct", lambda t: t.tokens == 20)
    assert (right(trace(20)), right(trace(21))) == (1.0, 0.0)


@pytest.mark.parametrize("name", ["length", "", "os:getcwd", "os.path:join", "tests.tiny:linears"])
def test_another_name_is_refused_and_never_imported(name):
    with pytest.raises(RacError, match=r"use uniform, inverse_length or correct, or from Python a function"):
        find_weighting(name, never)


def test_a_function_is_called_with_each_trace():
    weigh = find_weighting(lambda t: 2 if t.finish_reason == "stop" else 1, never)
    assert (weigh(trace(5)), weigh(trace(5, "length"))) == (2.0, 1.0)
    assert find_weighting(lambda t: 0, never)(trace(5)) == 0.0


@pytest.mark.parametrize("weight", [-1, float("nan"), float("inf"), "1", None])
def test_what_is_no_weight_is_refused_with_the_names_of_function_and_trace(weight):
    def by_mood(trace):
        return weight

    with pytest.raises(RacError, match=r"by_mood gives trace 't5#0' the weight .*; return a number of at least 0"):
        find_weighting(by_mood, never)(trace(5))


def test_the_factor_gives_a_mean_of_one_per_token():
    pairs = [(0.5, 10), (2.0, 30), (0.0, 60)]
    assert mean_one_factor(pairs) == 100 / 65
    with pytest.raises(RacError, match="weighs 0"):
        mean_one_factor([(0.0, 10)])
