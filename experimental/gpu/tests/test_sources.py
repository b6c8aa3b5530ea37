"""The kernels' sources are package data."""

from __future__ import annotations

import pytest
from rac_gpu import sources
from rac_gpu.layout import ALL

from rac_modifier.errors import RacError
from tests.emulate import SOURCES


@pytest.fixture(autouse=True)
def fresh():
    sources.read_sources.cache_clear()
    yield
    sources.read_sources.cache_clear()


def test_every_source_is_read():
    texts = sources.read_sources()
    assert texts == {path.name: path.read_text() for path in SOURCES.iterdir()}
    assert {layout.source for layout in ALL} < set(texts)


def test_missing_sources_are_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(sources, "FOLDER", tmp_path)
    with pytest.raises(RacError, match="no kernel sources; install rac-modifier-gpu again"):
        sources.read_sources()
