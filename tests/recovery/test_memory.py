import psutil
import pytest

from rac_modifier.errors import RacError
from rac_modifier.recovery.memory import check_recovery_memory, recovery_bytes
from tests.recovery.recovery_helpers import dense_and_sparse


def test_sixteen_bytes_per_weight_on_the_device_and_on_the_cpu():
    assert recovery_bytes(1000) == (16_000, 16_000)


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
