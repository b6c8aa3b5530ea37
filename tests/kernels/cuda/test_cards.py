"""Cards by name and by what torch reports of this machine; and that the table fits what the makers publish."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from rac_modifier.errors import RacError
from rac_modifier.kernels.cuda.cards import CARDS, card_of


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """A machine with these GPUs: name and multiprocessors."""

    def has(*devices: tuple[str, int]) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(devices))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(devices))
        found = [SimpleNamespace(name=name, multi_processor_count=count) for name, count in devices]
        monkeypatch.setattr(torch.cuda, "get_device_properties", found.__getitem__)

    return has


@pytest.mark.parametrize("name", ["a100", "h100", "h200", "b200", "4090", "l4", "H100"])
def test_a_card_is_found_by_its_name(name):
    assert card_of(name).name == name.lower()


# Published: dense bfloat16 products with sums in fp32, in TFLOPS, and bandwidth in GB/s, of the data sheets; the bandwidth of a
# B200 from the width and clock that its driver reports.
@pytest.mark.parametrize(
    ("name", "teraflops", "share", "gigabytes"),
    [
        ("a100", 312, 1, 2039),
        ("h100", 989, 0.5, 3350),
        ("h200", 989, 0.5, 4800),
        ("b200", 2250, 0.25, 7670),
        ("4090", 165.2, 1, 1008),
        ("l4", 121, 1, 300),
    ],
)
def test_the_table_fits_the_data_sheets(name, teraflops, share, gigabytes):
    """`share`: of the published rate that is taken to be open to `mma`; the rest needs other instructions."""
    card = card_of(name)
    assert card.bandwidth == gigabytes * 1e9
    assert card.peak == teraflops * 1e12
    assert card.processors * card.clock * card.products * 2 == pytest.approx(
        teraflops * share * 1e12, rel=0.01
    )


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(
        RacError,
        match=r'device "h300" is not known; use a100, h100, h200, b200, 4090, l4, or cuda:0',
    ):
        card_of("h300")
    for wrong in ("cuda:", "cuda:x", "cuda:-1", "cuda:0000", ""):
        with pytest.raises(RacError, match="is not known"):
            card_of(wrong)


def test_a_gpu_of_this_machine_is_found_by_what_it_reports(machine):
    machine(("NVIDIA L4", 58), ("NVIDIA H100 80GB HBM3", 132))
    assert (card_of("cuda").name, card_of("cuda:0").name, card_of("cuda:1").name) == (
        "l4",
        "l4",
        "h100",
    )


def test_a_gpu_that_is_not_there_or_not_in_the_table_is_an_error(machine):
    machine()
    with pytest.raises(
        RacError,
        match=r'device "cuda:0": torch finds no CUDA devices here; name a card: a100, h100',
    ):
        card_of("cuda:0")
    machine(("NVIDIA L40", 142), ("NVIDIA L4", 29))
    with pytest.raises(RacError, match=r'"cuda:2": torch finds 2 CUDA devices'):
        card_of("cuda:2")
    with pytest.raises(
        RacError,
        match=r'"cuda:0" is "NVIDIA L40" with 142 multiprocessors, which is not in the table',
    ):
        card_of("cuda:0")
    with pytest.raises(RacError, match=r'"NVIDIA L4" with 29 multiprocessors'):
        card_of("cuda:1")


def test_no_two_cards_share_a_name():
    assert (
        len({card.name for card in CARDS}) == len({card.reported for card in CARDS}) == len(CARDS)
    )
