"""What a run is forecast to need: against the bytes that live in one, and what is refused."""

import pytest
import torch
from llmcompressor import oneshot
from transformers import AutoModelForCausalLM

from rac_modifier import RacError, ReasoningAwareSparseGPTModifier
from rac_modifier.llmcompressor import forecast
from rac_modifier.llmcompressor.forecast import Forecast, Group, check_memory
from rac_modifier.settings.entries import PruningEntry
from tests.live_bytes import LiveBytes
from tests.tiny import entry, save_tiny

CPU, OTHER = torch.device("cpu"), torch.device("meta")
GATE, DOWN = Group("gate", 64, (100, 100), (None, None)), Group("down", 256, (64,), (None,))


def made(groups=(GATE, DOWN), tokens=10_000, by_layer=False, **settings):
    options = {"mask_structure": "2:4", "reconstruct": "pruned", **settings}
    batch = (4, 128)
    dtype = torch.bfloat16
    return Forecast(PruningEntry(**options), groups, 64, dtype, tokens, batch, 0, 0, by_layer)


@pytest.mark.parametrize(
    "settings",
    [
        {"preset": "quality"},
        {"preset": "quality", "reconstruct": "pruned"},
        {"preset": "fast"},
        {"preset": "paper"},
        {"preset": "quality", "quantization": {"scheme": "W8A8"}},
    ],
    ids=str,
)
def test_the_forecast_is_near_what_lives_in_a_run(tmp_path, trace_store, monkeypatch, settings):
    """At the second down_proj, where activations of both models, statistics and solver live together."""
    shape = {"hidden_size": 128, "intermediate_size": 640, "num_attention_heads": 2}
    model = AutoModelForCausalLM.from_pretrained(save_tiny(tmp_path / "wide", **shape))
    forecasts, live = [], LiveBytes()
    inner = forecast.check_memory

    def spy(made, *args, **options):
        result = inner(made, *args, **options)
        numbers = range(len(made.groups))
        forecasts.append(max(made.work(i) + made.activations(i) for i in numbers))
        live.reset()
        return result

    monkeypatch.setattr("rac_modifier.llmcompressor.pipeline.check_memory", spy)
    options = entry(trace_store, **settings)
    options["traces"]["allow_off_policy"] = True  # the store is another model's
    options["calibration"] = {"tokens": 3000, "batch_tokens": 256, "held_out_tokens": 0}
    with live:
        oneshot(model=model, recipe=ReasoningAwareSparseGPTModifier(**options))
    assert 0.85 < forecasts[-1] / (live.peak - live.base) < 1.35


def test_too_little_memory_is_an_error_that_names_module_bytes_and_next_step():
    run = made()
    needed, _ = run.on(CPU, CPU, CPU, recomputes=True)
    assert check_memory(run, CPU, CPU, free=lambda device: 10**12) == 0
    with pytest.raises(RacError) as caught:
        check_memory(run, CPU, CPU, free=lambda device: needed - 1)
    message = str(caught.value)
    assert message.startswith("pruning down is predicted to need")
    assert f"({needed:,} bytes)" in message
    assert f"({needed - 1:,} bytes) are free" in message
    assert "calibration.tokens" in message
    assert "preset: paper" in message
    assert "reconstruct: pruned" not in message  # it is already


def test_activations_and_solver_are_checked_on_their_own_devices():
    run = made([DOWN])
    free = {CPU: run.activations(0), OTHER: run.work(0)}
    check_memory(run, OTHER, CPU, free=free.get)
    for device in free:
        with pytest.raises(RacError, match=f"on {device}"):
            check_memory(run, OTHER, CPU, free={**free, device: free[device] - 1}.get)
    check_memory(run, OTHER, OTHER, free=lambda device: None)  # not known, so not checked


def test_wide_inputs_that_do_not_fit_are_recomputed_where_that_fits():
    run = made()
    kept, without = (run.on(CPU, CPU, CPU, recomputes=r)[0] for r in (False, True))
    assert without < kept - 0.9 * 10_000 * (256 - 64) * 2
    assert check_memory(run, CPU, CPU, free=lambda device: kept) == 0
    assert check_memory(run, CPU, CPU, free=lambda device: kept - 1) == 256
    assert check_memory(run, CPU, CPU, free=lambda device: 2 * without, processes=2) == 256


def test_layer_by_layer_the_statistics_of_a_layer_live_together_and_activations_are_narrow():
    by_layer, by_group = made(by_layer=True), made()
    assert by_layer.activations(1) == 10_000 * 64 * 2
    assert by_layer.work(0) >= by_group.work(0) + 4 * 256**2


def test_a_run_is_refused_before_anything_is_sampled(prune, monkeypatch):
    name = "rac_modifier.llmcompressor.calibration_modifier.build_calibration_set"
    monkeypatch.setattr(name, None)
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 1000}))
    with pytest.raises(RacError, match=r"is predicted to need .* are free: .*calibration\.tokens"):
        prune()
