"""Times that `make gpu-check` measured on a card, read from the JSON that it writes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rac_modifier.errors import RacError
from rac_modifier.files import read_json
from rac_modifier.kernels.cuda.cards import CARDS, Card
from rac_modifier.kernels.cuda.layout import (
    BF16,
    E4M3,
    E4M3_GROUPS,
    INT4,
    INT4_FP32_SCALES,
    INT8,
    INT8_GROUPS,
    UNSTRUCTURED,
    UNSTRUCTURED_E4M3,
    UNSTRUCTURED_E4M3_GROUPS,
    UNSTRUCTURED_INT4,
    UNSTRUCTURED_INT8,
    UNSTRUCTURED_INT8_GROUPS,
    Layout,
)

CONTENDERS: Mapping[str, Layout | str] = {
    "dense bf16": "bf16",
    "dense fp8": "fp8",
    "dense fp8 by CUTLASS": "fp8",
    "dense int4": "int4",
    "dense int4 by Machete": "int4",
    "bf16": BF16,
    "int8": INT8,
    "int8 g128": INT8_GROUPS[128],
    "int8 g64": INT8_GROUPS[64],
    "fp8": E4M3,
    "fp8 g128": E4M3_GROUPS[128],
    "fp8 g64": E4M3_GROUPS[64],
    "int4 g128": INT4[128],
    "int4 g64": INT4[64],
    "int4 g128 fp32 scales": INT4_FP32_SCALES[128],
    "int4 g64 fp32 scales": INT4_FP32_SCALES[64],
    "unstructured bf16": UNSTRUCTURED,
    "unstructured int8": UNSTRUCTURED_INT8,
    "unstructured int8 g128": UNSTRUCTURED_INT8_GROUPS[128],
    "unstructured int8 g64": UNSTRUCTURED_INT8_GROUPS[64],
    "unstructured fp8": UNSTRUCTURED_E4M3,
    "unstructured fp8 g128": UNSTRUCTURED_E4M3_GROUPS[128],
    "unstructured fp8 g64": UNSTRUCTURED_E4M3_GROUPS[64],
    "unstructured int4 g128": UNSTRUCTURED_INT4[128],
    "unstructured int4 g64": UNSTRUCTURED_INT4[64],
}
"""By the names that `make gpu-check` has: a layout, or a format of `predict.DENSE`. Of any pattern, half is stored there."""
_NAMES = {layout: name for name, layout in CONTENDERS.items() if isinstance(layout, Layout)}
_KINDS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("layer", "contender"), str),
    **dict.fromkeys(("rows", "columns", "tokens"), int),
    "us": (int, float),
}
_HALF = 0.02  # how far from half a density may be


@dataclass(frozen=True)
class MeasuredRow:
    """A time of one product, in microseconds. `layer` is the check's name of the shape, such as "qkv"."""

    layer: str
    rows: int
    columns: int
    tokens: int
    contender: str
    us: float


@dataclass(frozen=True)
class Measured:
    """The times of one card; `source`: the name of the file."""

    source: str
    card: Card
    times: tuple[MeasuredRow, ...]

    def us(self, rows: int, columns: int, tokens: int, contender: str | None) -> float | None:
        """Microseconds of one product of a contender; None where it was not measured."""
        wanted = rows, columns, tokens, contender
        found = (
            each.us
            for each in self.times
            if (each.rows, each.columns, each.tokens, each.contender) == wanted
        )
        return next(found, None)


def contender_of(layout: Layout | None, density: float, dense_bytes: float) -> str | None:
    """The check's name of what a layer runs on; None where it does not time that.

    `layout` None: dense, with `dense_bytes` per weight. `density` matters where a layout holds any pattern.
    """
    if layout is None:
        return "dense bf16" if dense_bytes == 2.0 else None
    return None if layout.any_pattern and abs(density - 0.5) > _HALF else _NAMES[layout]


def read_measured(path: Path) -> Measured:
    """Read the JSON of `make gpu-check`.

    Raises:
        RacError: no such JSON, a card that is not in the table, or a run that ended before anything was timed.
    """
    record = read_json(path, "give the JSON that make gpu-check wrote")
    card = next((card for card in CARDS if card.reported == record.get("device")), None)
    if card is None:
        known = ", ".join(card.reported for card in CARDS)
        raise RacError(
            f'{path}: device "{record.get("device")}" is not in the table of cards, which has {known}'
        )
    times = record.get("times")
    if not times:
        raise RacError(
            f"{path}: nothing was timed ({record.get('error', 'the run ended before')}); run make gpu-check again"
        )
    if not isinstance(times, list):
        raise RacError(
            f"{path}: times: {type(times).__name__} in place of a list; run make gpu-check again"
        )
    return Measured(path.name, card, tuple(_row(path, n, each) for n, each in enumerate(times)))


def _row(path: Path, number: int, found: Any) -> MeasuredRow:
    for key, kind in _KINDS.items():
        value = found.get(key) if isinstance(found, dict) else None
        sound = isinstance(value, kind) and not isinstance(value, bool)
        if not sound or (
            isinstance(value, (int, float)) and not (math.isfinite(value) and value > 0)
        ):
            raise RacError(
                f"{path}: times[{number}].{key}: {value!r}; run make gpu-check of this version again"
            )
    return MeasuredRow(**{key: found[key] for key in _KINDS})
