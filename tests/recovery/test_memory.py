import psutil
import pytest

from rac_modifier.errors import RacError
from rac_modifier.recovery.memory import check_recovery_memory, recovery_bytes
from tests.recovery.recovery_helpers import dense_and_sparse


def test_sixteen_bytes_per_weight_on_the_device_and_on_the_cpu():
    assert recovery_bytes(1000) == (16_000, 16_000)
    assert recovery_bytes(1000, 4) == (4_000, 16_000 + 4 * 8_000)


def test_too_little_memory_is_refused_before_anything_is_sampled(monkeypatch):
    dense, _ = dense_and_sparse()
    count = sum(p.numel() for p in dense.parameters())
    memory = type("Memory", (), {"available": 0})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    memory.available = int(count * 32 / 0.9) + 10
    check_recovery_memory(dense)
    memory.available = int(count * 32 / 0.9) - 1000
    with pytest.raises(RacError, match=r"recover: training needs about .* GiB on the CPU, and .* GiB are free"):
        check_recovery_memory(dense)


def test_processes_share_the_device_and_multiply_the_whole_model(monkeypatch):
    dense, _ = dense_and_sparse()
    count = sum(p.numel() for p in dense.parameters())
    memory = type("Memory", (), {"available": int(count * (16 + 16 + 2 * 8) / 0.9) + 100})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    check_recovery_memory(dense, 2)
    with pytest.raises(RacError, match="training needs about"):
        check_recovery_memory(dense, 3)
