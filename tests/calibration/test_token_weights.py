import pytest
import torch

from rac_modifier import RacError
from rac_modifier.calibration.loader import CalibrationLoader
from rac_modifier.calibration.mixture import CalibrationSequence, compose
from rac_modifier.calibration.token_weights import gradient_weights
from rac_modifier.settings.calibration import CalibrationSettings
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
