"""Packed weights in huge pages: the same bytes, apart from each other, in memory so advised."""

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rac_modifier.formats.stored_weight import all_stored
from rac_modifier.kernels.cpu import huge_pages, pack
from rac_modifier.kernels.cpu.huge_pages import in_huge_pages

linux = pytest.mark.skipif(sys.platform != "linux", reason="MADV_HUGEPAGE is Linux's")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(huge_pages, "_CHUNK", 1 << 22)
    monkeypatch.setattr(huge_pages, "_chunk", torch.empty(0, dtype=torch.uint8))
    monkeypatch.setattr(huge_pages, "_used", 0)


@pytest.mark.parametrize("sizes", [(1, 4097, 0, 100), (3 << 20, 3 << 20, 9 << 20, 5)])
def test_copies_have_their_bytes_and_share_none(sizes):
    originals = [torch.randint(0, 256, (size,), dtype=torch.uint8) for size in sizes]
    copies = [in_huge_pages(original) for original in originals]
    assert all(map(torch.equal, copies, originals))
    for copy in copies:
        copy += 1
    assert all(
        torch.equal(copy, original + 1) for copy, original in zip(copies, originals, strict=True)
    )
    assert all(copy.data_ptr() % 4096 == 0 for copy in copies if copy.numel())


@linux
def test_the_memory_is_advised_to_be_in_huge_pages_and_is_given_back():
    copy = in_huge_pages(torch.ones(1 << 20, dtype=torch.uint8))

    def flags(address):
        text = Path("/proc/self/smaps").read_text()
        areas = re.findall(r"^([0-9a-f]+)-([0-9a-f]+) (?:.*\n)+?VmFlags: (.*)$", text, re.M)
        return [f.split() for a, b, f in areas if int(a, 16) <= address < int(b, 16)]

    address = copy.data_ptr()
    assert "hg" in flags(address)[0]
    assert "sh" not in flags(address)[0]  # shared memory has other rules
    huge_pages._chunk = torch.empty(0, dtype=torch.uint8)
    assert flags(address)
    del copy
    assert not any("hg" in found for found in flags(address))


def test_pack_puts_a_weight_there(best):
    weight = replace(
        all_stored(torch.ones(64, 128, dtype=torch.int8), "w"), scale=torch.ones(64, 1)
    )
    data = pack(weight, torch.float32)["weight_packed"]
    within = data.data_ptr() - huge_pages._chunk.data_ptr()
    assert 0 <= within <= len(huge_pages._chunk) - len(data)
