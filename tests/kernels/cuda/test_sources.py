"""Where the kernels' sources are found."""

from __future__ import annotations

import pytest

from rac_modifier.errors import RacError
from rac_modifier.kernels.cuda import sources
from rac_modifier.kernels.cuda.layout import (
    BF16,
    INT4,
    INT8,
    UNSTRUCTURED,
    UNSTRUCTURED_INT4,
    UNSTRUCTURED_INT8,
)
from tests.kernels.cuda.emulate import SOURCES


@pytest.fixture(autouse=True)
def fresh():
    sources.read_sources.cache_clear()
    yield
    sources.read_sources.cache_clear()


def test_every_source_of_a_clone_is_read():
    found = sources.read_sources()
    assert found == {path.name: path.read_text() for path in SOURCES.iterdir()}
    layouts = (BF16, INT4[64], INT8, UNSTRUCTURED, UNSTRUCTURED_INT8, UNSTRUCTURED_INT4[64])
    assert {
        *(layout.source for layout in layouts),
        "ptx.h",
        "decode.h",
        "wide.h",
        "bytes.h",
        "unstructured.h",
        "windows.h",
    } == set(found)


def test_those_of_an_installed_package_come_first(monkeypatch, tmp_path):
    for name in ("ptx.h", "a.cu", "notes.txt"):
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(sources, "INSTALLED", tmp_path)
    assert sources.read_sources() == {"ptx.h": "ptx.h", "a.cu": "a.cu"}


def test_where_there_are_none_the_error_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(sources, "INSTALLED", tmp_path / "a")
    monkeypatch.setattr(sources, "CLONE", tmp_path / "b")
    with pytest.raises(RacError, match="no kernel sources; install the package again"):
        sources.read_sources()
