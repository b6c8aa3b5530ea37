"""The fake GPU as a fixture, and the same random numbers in each run of a test."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import pytest
import torch

from tests.fake_gpu import FakeDriver, fake_gpu


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> None:
    """Seed torch from the test's name."""
    torch.manual_seed(zlib.crc32(request.node.name.encode()))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDriver]:
    """The driver of an H100 that is not there."""
    with fake_gpu(monkeypatch) as fake:
        yield fake
