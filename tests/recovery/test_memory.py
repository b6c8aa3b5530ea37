"""The prediction against bytes that live in a real run, and what is refused before anything is sampled."""

import dataclasses

import psutil
import pytest
import torch

from rac_modifier.errors import RacError
from rac_modifier.processes import Processes
from rac_modifier.recovery.distill import recover
from rac_modifier.recovery.memory import (
    Batch,
    check_recovery_memory,
    largest_batches,
    recovery_need,
    step_bytes,
)
from rac_modifier.settings.recovery import RecoverySettings
from tests.live_bytes import LiveBytes
from tests.recovery.recovery_helpers import LiveTeacher, dense_and_sparse, sequences

CPU = torch.device("cpu")
SETTINGS = RecoverySettings(step_tokens=300, batch_tokens=400)


def trained(model):
    return sum(
        p.numel()
        for name, p in model.named_parameters()
        if "embed" not in name and "lm_head" not in name
    )


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_prediction_is_what_lives_in_a_run(checkpointing, autocast, monkeypatch):
    """Within 10 %, of tensors that operators made: weights come in float32, so they are not among them."""
    monkeypatch.setattr(
        "rac_modifier.recovery.memory.bf16_is_fast", lambda device: autocast is not None
    )
    dense, sparse = dense_and_sparse()
    settings = SETTINGS.model_copy(update={"activation_checkpointing": checkpointing})
    training, held_out = sequences(60, seed=1), sequences(5, seed=2)
    need = recovery_need(dense, settings, largest_batches(training, settings, CPU, 1), CPU)
    with LiveBytes() as live:
        live.reset()
        recover(
            sparse,
            LiveTeacher(dense),
            training,
            held_out,
            settings,
            autocast=autocast,
            progress=False,
        )
    gaps = int(0.15 * need.step)  # of the process, not of tensors
    assert need.device + need.host - gaps == pytest.approx(live.peak - live.base, rel=0.1)


def test_what_a_gpu_holds_and_what_the_cpu_beside_it(monkeypatch):
    """On a GPU the model itself counts; on the CPU are the best weights, and the state while it is written."""
    monkeypatch.setattr("rac_modifier.recovery.memory.bf16_is_fast", lambda device: True)
    dense, _ = dense_and_sparse()
    count = trained(dense)
    other = sum(p.nbytes for p in dense.parameters()) - 4 * count
    need = recovery_need(dense, SETTINGS, [Batch(1, 40, 39)], torch.device("cuda"))
    assert need.device == (4 + 8 + 1) * count + need.step + other
    assert need.host == (4 + 12) * count


def test_processes_share_weights_and_each_loads_the_model():
    dense, _ = dense_and_sparse()
    count = trained(dense)
    one, two, four = (
        recovery_need(dense, SETTINGS, [Batch(4, 40, 150)], CPU, processes=n) for n in (1, 2, 4)
    )
    assert four.host - two.host == 2 * 2 * 4 * count
    assert four.device < two.device
    assert one.host == 4 * count


def test_codes_take_more_than_weights():
    dense, _ = dense_and_sparse()
    coded = sum(p.numel() for name, p in dense.named_parameters() if "proj" in name)
    plain, codes = (
        recovery_need(dense, SETTINGS, [Batch(1, 40, 39)], CPU, quantizes=n) for n in (False, True)
    )
    assert codes.device - plain.device == (9 + 8) * coded


def test_the_largest_batches_are_some_that_are_trained_on():
    traces = [([1] * n, 2) for n in (20, 22, 100, 900)]
    settings = RecoverySettings(step_tokens=2000, batch_tokens=400)
    assert largest_batches(traces, settings, CPU, 1) == [
        Batch(1, 900, 898),
        Batch(2, 22, 38, follows=False),
    ]
    assert largest_batches(traces[:3], settings, torch.device("cuda"), 1) == [
        Batch(3, 100, 136, follows=False)
    ]


def test_too_little_memory_is_refused_with_what_would_help(monkeypatch):
    dense, _ = dense_and_sparse()
    memory = type("Memory", (), {"available": 1 << 40})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    need = check_recovery_memory(dense, SETTINGS)
    total = need.device + need.host
    memory.available = int(total / 0.9) + 10
    assert dataclasses.astuple(check_recovery_memory(dense, SETTINGS)) == dataclasses.astuple(need)
    memory.available = int(total / 0.9) - 1000
    with pytest.raises(
        RacError,
        match=r"needs about .* GiB on the CPU .* 1 x 400 tokens.* are free; set recover.activ",
    ):
        check_recovery_memory(dense, SETTINGS)
    with pytest.raises(RacError, match="GiB on the CPU"):
        check_recovery_memory(dense, SETTINGS, Processes(0, 2, CPU))


def test_shapes_that_depend_on_data_are_said_not_to_be_counted(monkeypatch):
    from torch._subclasses.fake_tensor import DataDependentOutputException

    def routed(*args, **options):
        raise DataDependentOutputException(torch.ops.aten.nonzero.default)

    monkeypatch.setattr("rac_modifier.recovery.memory.step_bytes", routed)
    dense, _ = dense_and_sparse()
    need = recovery_need(dense, SETTINGS, [Batch(1, 40, 39)], CPU)
    assert need.step is None
    assert need.device == (4 + 8 + 1 + 4 - 4) * trained(dense)


def test_activations_grow_with_tokens_and_checkpointing_keeps_few_of_them():
    dense, _ = dense_and_sparse()

    def taken(length, recomputes):
        batch = Batch(1, length, length - 1, follows=False)
        return step_bytes(dense, batch, autocast=None, recomputes=recomputes, keeps_gradients=False)

    assert 1.8 * taken(100, False) < taken(200, False) < 2.2 * taken(100, False)
    assert taken(200, True) < 0.8 * taken(200, False)


def test_a_rehearsal_leaves_the_model_as_it_is():
    dense, _ = dense_and_sparse()
    dense.to(torch.bfloat16)
    before = {name: (p, p.clone()) for name, p in dense.named_parameters()}
    step_bytes(dense, Batch(2, 50, 90), autocast=torch.bfloat16, recomputes=True)
    for name, p in dense.named_parameters():
        assert p is before[name][0]
        assert torch.equal(p, before[name][1])
        assert p.requires_grad
        assert p.grad is None
