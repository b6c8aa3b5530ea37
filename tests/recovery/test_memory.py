"""The forecast against bytes that live in a real run, and what is refused before sampling."""

from types import SimpleNamespace

import psutil
import pytest
import torch

from rac_modifier.distributed.processes import Processes
from rac_modifier.errors import RacError
from rac_modifier.formats.encoding import Encoding
from rac_modifier.recovery import memory
from rac_modifier.recovery.memory import (
    Batch,
    RecoveryNeed,
    check_recovery_memory,
    largest_batch,
    recovery_need,
    step_bytes,
)
from rac_modifier.recovery.on_grid import QuantizedWeight
from rac_modifier.runtime.cpu_tuning import HEAP_GAPS
from rac_modifier.runtime.models import LiveBytes
from rac_modifier.settings.recovery import RecoverySettings
from tests.recovery.recovery_helpers import SETTINGS, dense_and_sparse, run, sequences
from tests.tiny import linears

CPU, SMALL = torch.device("cpu"), Batch(1, 40, 39)
DENSE, _ = dense_and_sparse()
COUNT = sum(
    p.numel() for name, p in DENSE.named_parameters() if "embed" not in name and "head" not in name
)


@pytest.mark.parametrize("codes", [False, True])
@pytest.mark.parametrize(
    ("checkpointing", "autocast"), [(False, None), (False, torch.bfloat16), (True, None)]
)
def test_the_forecast_is_what_lives_in_a_run(checkpointing, autocast, codes, monkeypatch):
    """Nearly, of tensors that operators made: float32 weights are not among them."""
    fast = autocast is not None
    monkeypatch.setattr("rac_modifier.recovery.memory.bf16_is_fast", lambda device: fast)
    dense, sparse = dense_and_sparse()
    settings = SETTINGS.model_copy(update={"activation_checkpointing": checkpointing})
    batch = largest_batch(sequences(60, seed=1), settings, CPU, 1)
    need = recovery_need(dense, settings, batch, CPU, quantizes=codes)
    coded = [name for name in linears(sparse) if codes and name != "lm_head"]
    with LiveBytes() as live:
        weights = {name: sparse.get_submodule(name).weight.detach() for name in coded}
        quantized = {name: with_codes(weight) for name, weight in weights.items()}
        run(sparse, dense, settings, (60, 5), autocast=autocast, quantized=quantized)
    gaps = int(0.15 * need.step)  # of the process, not of tensors
    share = (need.device + need.host - gaps) / live.peak
    assert 0.9 < share < 1.15


def with_codes(weight: torch.Tensor) -> QuantizedWeight:
    scale = weight.unflatten(1, (-1, 32)).abs().amax(-1).clamp(min=1e-6) / 7.5
    return QuantizedWeight(Encoding("int", 4, 32), scale.bfloat16(), weight.clone())


def test_what_is_counted_per_weight(monkeypatch):
    """On a GPU the model itself too; on the CPU the best weights, and a state that is written."""
    monkeypatch.setattr("rac_modifier.recovery.memory.bf16_is_fast", lambda device: True)
    other = sum(p.nbytes for p in DENSE.parameters()) - 4 * COUNT
    gpu = recovery_need(DENSE, SETTINGS, SMALL, torch.device("cuda"))
    assert gpu.device == (4 + 8 + 1) * COUNT + gpu.step + other
    assert gpu.host == (4 + 12) * COUNT
    alone = recovery_need(DENSE, SETTINGS, SMALL, CPU)
    codes = recovery_need(DENSE, SETTINGS, SMALL, CPU, quantizes=True)
    coded = sum(p.numel() for name, p in DENSE.named_parameters() if "proj" in name)
    assert codes.device - alone.device == 8 * coded
    monkeypatch.setattr("rac_modifier.recovery.memory.bf16_is_fast", lambda device: False)
    both = [recovery_need(DENSE, SETTINGS, SMALL, CPU, quantizes=q).device for q in (False, True)]
    assert both[1] - both[0] == (4 + 8) * coded
    assert alone.host == 4 * COUNT


def test_what_is_counted_with_several_processes(monkeypatch):
    """Each has a part of weights, state and gradients, and of a batch, and three whole layers."""
    parts = []
    monkeypatch.setattr(memory, "bf16_is_fast", lambda device: True)
    monkeypatch.setattr(memory, "step_bytes", lambda _, part, *a, **o: parts.append(part) or 1000)
    layer = sum(p.numel() for p in DENSE.model.layers[0].parameters())
    frozen = sum(p.nbytes for p in DENSE.parameters()) - 4 * COUNT
    for device, step in (("cpu", int(1000 * HEAP_GAPS)), ("cuda", 1000 + frozen)):
        args = DENSE, SETTINGS, Batch(5, 40, 150), torch.device(device)
        for count in (2, 4):
            need = recovery_need(*args, processes=count)
            assert need.device == (4 + 8 + 1 + 4) * COUNT // count + 3 * 4 * layer + step
            assert need.host == (4 + 12 + 4 + 2 * 4 * count) * COUNT
    assert parts == [Batch(3, 40, 90), Batch(2, 40, 60)] * 2


def test_the_largest_batch_is_one_that_is_trained_on():
    traces = [([1] * n, 2) for n in (20, 22, 100, 900)]
    settings = RecoverySettings(step_tokens=2000, batch_tokens=400)
    assert largest_batch(traces, settings, CPU, 1) == Batch(1, 900, 898)
    assert largest_batch(traces[:3], settings, torch.device("cuda"), 1) == Batch(3, 100, 136)


def test_too_little_memory_is_refused_with_what_would_help(monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    says = r"needs about .* GiB on the CPU .* 1 x 400 tokens.* are free; set recover.activ"
    with pytest.raises(RacError, match=says):
        check_recovery_memory(DENSE, SETTINGS)


@pytest.mark.parametrize(
    ("device", "count", "need", "refused"),
    [
        ("cpu", 1, (800, 100), None),
        ("cpu", 2, (400, 101), "the CPU"),
        ("cuda", 2, (900, 900), None),
        ("cuda", 2, (901, 900), "the GPU"),
        ("cuda", 2, (900, 901), "the CPU"),
    ],
)
def test_nine_tenths_of_the_free_memory_are_used(device, count, need, refused, monkeypatch):
    """Processes on a CPU share its memory; each has a GPU of its own."""
    need = RecoveryNeed(*need, 0)
    monkeypatch.setattr(memory, "recovery_need", lambda *args, **options: need)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 2000))
    settings = RecoverySettings(step_tokens=300, batch_tokens=4096)
    args = DENSE, settings, Processes(0, count, torch.device(device))
    if refused is None:
        assert check_recovery_memory(*args) == need
        return
    with pytest.raises(RacError, match=rf"GiB on {refused} .* a step on 1 x 600 tokens"):
        check_recovery_memory(*args)


def test_shapes_that_depend_on_data_are_not_counted(monkeypatch):
    def routed(*args, **options):
        raise RuntimeError("aten.nonzero.default")

    monkeypatch.setattr("rac_modifier.recovery.memory.step_bytes", routed)
    need = recovery_need(DENSE, SETTINGS, SMALL, CPU)
    assert need.step is None
    assert need.device == (4 + 8 + 1 + 4 - 4) * COUNT


def test_a_rehearsal_counts_activations_and_leaves_the_model_as_it_is():
    dense, _ = dense_and_sparse()
    before = {name: (p, p.clone()) for name, p in dense.named_parameters()}

    def taken(length, recomputes, frees=True):
        batch = Batch(1, length, length - 1)
        return step_bytes(dense, batch, recomputes, bf16=False, frees=frees)

    short, long = taken(100, False), taken(200, False)
    assert 1.8 * short < long < 2.2 * short
    assert taken(200, True) < 0.8 * long
    assert taken(100, False, frees=False) - short == 4 * COUNT  # gradients of what is trained
    for name, p in dense.named_parameters():
        assert p is before[name][0]
        assert torch.equal(p, before[name][1])
        assert p.requires_grad
        assert p.grad is None
