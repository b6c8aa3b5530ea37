"""GPUs that times can be predicted for: what their makers and others publish of them. Nothing here was measured by us."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from rac_modifier.errors import RacError


@dataclass(frozen=True)
class Card:
    """A GPU. docs/results/gpu.md has the source of each number.

    title: as people name it. reported: the name that its driver reports. capability: compute capability. bandwidth: of its
    memory, bytes per second. processors: multiprocessors. clock: cycles per second. products: multiply-adds of a dense
    bfloat16 product that a multiprocessor does per cycle with `mma`. cache: bytes of L2. cache_port: bytes per cycle that L2
    gives a multiprocessor. peak: published operations per second of dense bfloat16 products, a multiply-add being two.
    """

    name: str
    title: str
    reported: str
    capability: tuple[int, int]
    bandwidth: float
    processors: int
    clock: float
    products: int
    cache: int
    cache_port: float
    peak: float

    @property
    def architecture(self) -> str:
        """Such as sm_90."""
        return f"sm_{self.capability[0]}{self.capability[1]}"


_MB = 1 << 20
CARDS = (
    Card(
        "a100",
        "A100 SXM 80 GB",
        "NVIDIA A100-SXM4-80GB",
        (8, 0),
        2.039e12,
        108,
        1.41e9,
        1024,
        40 * _MB,
        35,
        312e12,
    ),
    Card(
        "h100",
        "H100 SXM",
        "NVIDIA H100 80GB HBM3",
        (9, 0),
        3.35e12,
        132,
        1.83e9,
        1024,
        50 * _MB,
        35,
        989e12,
    ),
    Card(
        "h200", "H200 SXM", "NVIDIA H200", (9, 0), 4.8e12, 132, 1.83e9, 1024, 50 * _MB, 37, 989e12
    ),
    Card(
        "b200", "B200", "NVIDIA B200", (10, 0), 7.67e12, 148, 1.86e9, 1024, 126 * _MB, 35, 2.25e15
    ),
    Card(
        "4090",
        "GeForce RTX 4090",
        "NVIDIA GeForce RTX 4090",
        (8, 9),
        1.008e12,
        128,
        2.52e9,
        256,
        72 * _MB,
        15,
        165.2e12,
    ),
    Card("l4", "L4", "NVIDIA L4", (8, 9), 0.3e12, 58, 2.04e9, 512, 48 * _MB, 15, 121e12),
)

_KNOWN = ", ".join(card.name for card in CARDS)
_HERE = re.compile(r"cuda(?::(\d{1,3}))?")


def reported_card(name: str, processors: int) -> Card | None:
    """The card whose driver reports this name, with as many multiprocessors; None if it is not in the table."""
    return next(
        (card for card in CARDS if (card.reported, card.processors) == (name, processors)), None
    )


def card_of(name: str) -> Card:
    """The card of a name such as "h100", or of this machine's "cuda:0".

    Raises:
        RacError: a name that is not known, no such device, or a device that is not in the table.
    """
    here = _HERE.fullmatch(name)
    if here is None:
        found = next((card for card in CARDS if card.name == name.lower()), None)
        if found is None:
            raise RacError(
                f'device "{name}" is not known; use {_KNOWN}, or cuda:0 for the first GPU of this machine'
            )
        return found
    count, index = (
        (torch.cuda.device_count() if torch.cuda.is_available() else 0),
        int(here[1] or 0),
    )
    if index >= count:
        raise RacError(
            f'device "{name}": torch finds {count or "no"} CUDA devices here; name a card: {_KNOWN}'
        )
    device = torch.cuda.get_device_properties(index)
    card = reported_card(device.name, device.multi_processor_count)
    if card is None:
        raise RacError(
            f'device "{name}" is "{device.name}" with {device.multi_processor_count} multiprocessors, which is not in the '
            f"table; name the card that is most like it: {_KNOWN}"
        )
    return card
