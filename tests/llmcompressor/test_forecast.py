"""What a run is forecast to need: against the bytes that live in one, and what is refused."""

import pytest
import torch
from llmcompressor import oneshot
from transformers import AutoModelForCausalLM

from rac_modifier import RacError, ReasoningAwareSparseGPTModifier
from rac_modifier.llmcompressor import forecast
from rac_modifier.llmcompressor.forecast import Forecast, Group
from rac_modifier.runtime.models import LiveBytes
from rac_modifier.settings.entries import PruningEntry
from tests.tiny import entry, save_tiny

CPU, OTHER = torch.device("cpu"), torch.device("meta")
GATE = Group("gate", 0, 64, (100, 100), (None, None))
DOWN = Group("down", 0, 256, (64,), (None,))


def made(groups=(GATE, DOWN), by_layer=False, **settings):
    options = {"mask_structure": "2:4", "reconstruct": "pruned", **settings}
    entry, dtype = PruningEntry(**options), torch.bfloat16
    return Forecast(entry, groups, 64, dtype, by_layer, [(4, 125)] * 20)


@pytest.mark.parametrize(
    "settings",
    [
        {"preset": "quality"},
        {"preset": "quality", "reconstruct": "pruned"},
        {"preset": "paper"},
        {"preset": "fast", "quantization": {"scheme": "W8A8"}},
    ],
    ids=str,
)
def test_the_forecast_is_near_what_lives_in_a_run(tmp_path, trace_store, monkeypatch, settings):
    """At the second down_proj, where activations, statistics and solver live together."""
    shape = {"hidden_size": 128, "intermediate_size": 640, "num_attention_heads": 2}
    model = AutoModelForCausalLM.from_pretrained(save_tiny(tmp_path / "wide", **shape))
    forecasts, before, live = [], [], LiveBytes()

    def spy(self, *devices):
        forecasts.append(max(self.work(i) + self.activations(i) for i in range(len(self.groups))))
        before.append(live.now)
        live.peak = live.now

    monkeypatch.setattr(Forecast, "check", spy)
    options = entry(trace_store, **settings)
    options["traces"]["allow_off_policy"] = True  # the store is another model's
    options["calibration"] = {"tokens": 3000, "batch_tokens": 256, "held_out_tokens": 0}
    with live:
        oneshot(model=model, recipe=ReasoningAwareSparseGPTModifier(**options))
    assert 0.85 < forecasts[-1] / (live.peak - before[-1]) < 1.35


@pytest.fixture
def free(monkeypatch):
    """The free bytes by device; None: not known."""
    bytes_free = {}
    monkeypatch.setattr(forecast, "free_bytes", bytes_free.get)
    return bytes_free


def test_too_little_memory_is_an_error_that_names_module_bytes_and_next_step(free):
    run = made()
    needed = int(forecast.HEAP_GAPS * run.work(1)) + run.activations(1)
    free[CPU] = 2 * needed
    run.check(CPU, CPU, 2)
    free[CPU] = needed - 1
    with pytest.raises(RacError) as caught:
        run.check(CPU, CPU)
    message = str(caught.value)
    assert message.startswith("pruning down needs")
    assert f"({needed:,} bytes)" in message
    assert f"({needed - 1:,} bytes) are free" in message
    assert "calibration.tokens" in message
    assert "preset: paper" in message


def test_activations_and_solver_are_checked_on_their_own_devices(free):
    run = made([DOWN])
    enough = {CPU: run.activations(0), OTHER: run.work(0)}
    free.update(enough)
    run.check(OTHER, CPU)
    for device in enough:
        free.update(enough | {device: enough[device] - 1})
        with pytest.raises(RacError, match=f"on {device}"):
            run.check(OTHER, CPU)
    free.clear()
    run.check(OTHER, OTHER)


def test_layer_by_layer_statistics_live_together_and_activations_are_narrow():
    by_layer, by_group = made(by_layer=True), made()
    assert by_layer.activations(1) == 10_000 * 64 * 2
    assert by_group.activations(1) == 10_000 * (64 + 256) * 2
    assert made(reconstruct="dense").activations(1) == 10_000 * (64 + 256 + 64 + 64) * 2
    assert by_layer.work(0) >= by_group.work(0) + 4 * 256**2


@pytest.mark.usefixtures("nothing_is_sampled")
def test_a_run_is_refused_before_anything_is_sampled(prune, monkeypatch):
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 1000}))
    with pytest.raises(RacError, match=r" needs .* are free: .*calibration\.tokens"):
        prune()
