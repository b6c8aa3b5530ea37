"""The fake GPU as a fixture."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.kernels.cuda.fake_gpu import FakeDriver, fake_gpu


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDriver]:
    """The driver of an H100 that is not there."""
    with fake_gpu(monkeypatch) as fake:
        yield fake
