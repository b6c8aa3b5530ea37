"""The names of the packed formats and the choice between them; the layouts themselves are in test_bitmask.py."""

from __future__ import annotations

import pytest
import torch

from rac_modifier.checkpoint.formats import (
    choose_format,
    pack,
    packed_modules,
    structure_of,
    unpack,
    with_values,
)
from rac_modifier.errors import RacError

NAMES = {
    "sparse-24-bitmask": {"compressed", "bitmask", "shape"},
    "sparse-bitmask": {"compressed", "bitmask", "row_offsets", "shape"},
}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("2:4", "2:4"),
        ("1:4", "1:4"),
        ("04:8", "4:8"),
        ("unstructured", "unstructured"),
        ("0:0", "unstructured"),
    ],
)
def test_structures(value: str, expected: str) -> None:
    assert structure_of(value, "a") == expected


@pytest.mark.parametrize(
    "value", ["", "dense", "5:4", "4:4", "0:4", "2:4 ", "-1:4", "2:4:8", "1:10000000"]
)
def test_what_is_no_structure_names_the_module_and_the_value(value: str) -> None:
    with pytest.raises(RacError, match=r"^layers\.0: mask_structure ") as caught:
        structure_of(value, "layers.0")
    assert value.strip() in str(caught.value)


@pytest.mark.parametrize(
    ("structures", "expected"),
    [
        (["2:4", "2:4"], "sparse-24-bitmask"),
        (["2:4", "unstructured"], "sparse-bitmask"),
        (["4:8"], "sparse-bitmask"),
        (["unstructured"], "sparse-bitmask"),
    ],
)
def test_one_format_for_all_modules(structures: list[str], expected: str) -> None:
    assert choose_format(structures) == expected


@pytest.mark.parametrize("format", NAMES)
def test_a_weight_comes_back_from_its_parts(format: str) -> None:
    weight = torch.arange(1, 33).view(4, 8).float()
    weight.view(-1, 4)[:, 1:3] = 0
    parts = pack(weight, format, "w")
    assert parts.keys() == NAMES[format]
    assert torch.equal(unpack(parts, format, "w"), weight)
    assert with_values(parts, format, "w") is parts
    with pytest.raises(RacError, match=r"^w\.bitmask: missing from the checkpoint"):
        unpack({name: part for name, part in parts.items() if name != "bitmask"}, format, "w")


def test_packed_modules_are_known_by_any_part_that_only_they_have() -> None:
    names = [
        "b.compressed",
        "b.shape",
        "a.row_offsets",
        "c.bitmask",
        "d.shape",
        "e.weight",
        "bitmask",
        "f.bitmasks",
    ]
    assert packed_modules(names) == ["a", "b", "c"]
