"""Names of formats and structures; packed tensors against what config.json describes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rac_modifier.checkpoint.files import TensorFiles
from rac_modifier.checkpoint.formats import (
    FORMAT_24,
    FORMAT_BITMASK,
    check_packed,
    choose_format,
    packed_modules,
    structure_of,
)
from rac_modifier.checkpoint.quantization_config import WeightScheme
from rac_modifier.errors import RacError

WORDS8 = WeightScheme("int", 8, "channel", None, True, "pack-quantized", None)


def files(
    folder: Path, dtype: torch.dtype = torch.bfloat16, **changes: torch.Tensor | None
) -> TensorFiles:
    tensors = {
        "up.compressed": torch.ones(2, 2, dtype=dtype),
        "up.bitmask": torch.ones(2, 1, dtype=torch.uint8),
    }
    tensors |= {"up.shape": torch.tensor([[2], [4]]), "norm.weight": torch.ones(4)}
    tensors |= {name.replace("_", ".", 1): tensor for name, tensor in changes.items()}
    save_file(
        {name: tensor for name, tensor in tensors.items() if tensor is not None},
        folder / "model.safetensors",
    )
    return TensorFiles(folder)


@pytest.mark.parametrize(
    ("dtype", "schemes", "in_words"),
    [
        (torch.bfloat16, (), []),
        (torch.int8, (), []),
        (torch.int8, (WORDS8,), ["up"]),
        (torch.int32, (), ["up"]),
        (torch.float8_e4m3fn, (WORDS8,), []),
    ],
)
def test_modules_that_are_int32_words_to_upstream(
    tmp_path: Path, dtype: torch.dtype, schemes: tuple[WeightScheme, ...], in_words: list[str]
) -> None:
    with files(tmp_path, dtype) as tensor_files:
        assert check_packed(tensor_files, "sparse-24-bitmask", schemes) == in_words


@pytest.mark.parametrize(
    ("format", "changes", "message"),
    [
        (None, {}, "up is packed but config.json has no sparsity_config"),
        ("sparse-bitmask", {}, r"up\.row_offsets: missing"),
        ("sparse-24-bitmask", {"up_shape": None}, r"up\.shape: missing"),
        (
            "sparse-24-bitmask",
            {"up_weight": torch.ones(2, 4)},
            r"up\.weight: stored both dense and packed",
        ),
        (
            "sparse-24-bitmask",
            {"up_compressed": None, "up_bitmask": None},
            "no tensor is packed; copy the whole model",
        ),
    ],
)
def test_contradictions(tmp_path: Path, format: str | None, changes: dict, message: str) -> None:
    with files(tmp_path, **changes) as tensor_files, pytest.raises(RacError, match=message):
        check_packed(tensor_files, format)


def test_a_dense_checkpoint(tmp_path: Path) -> None:
    with files(tmp_path, up_compressed=None, up_bitmask=None, up_shape=None) as tensor_files:
        assert check_packed(tensor_files, None) == []


@pytest.mark.parametrize(
    ("value", "expected"),
    [("2:4", "2:4"), ("04:8", "4:8"), ("unstructured", "unstructured"), ("0:0", "unstructured")],
)
def test_structures(value: str, expected: str) -> None:
    assert structure_of(value, "a") == expected


@pytest.mark.parametrize("value", ["", "dense", "5:4", "4:4", "0:4", "-1:4", "2:4:8", "1:10000000"])
def test_what_is_no_structure_names_the_module_and_the_value(value: str) -> None:
    with pytest.raises(RacError, match=r"^layers\.0: mask_structure ") as caught:
        structure_of(value, "layers.0")
    assert value in str(caught.value)


@pytest.mark.parametrize(
    ("structures", "expected"),
    [
        (["2:4", "2:4"], FORMAT_24),
        (["2:4", "unstructured"], FORMAT_BITMASK),
        (["4:8"], FORMAT_BITMASK),
    ],
)
def test_one_format_for_all_modules(structures: list[str], expected: str) -> None:
    assert choose_format(structures) == expected


def test_packed_modules_are_known_by_any_part_that_only_they_have() -> None:
    names = ["b.compressed", "b.shape", "a.row_offsets", "c.bitmask", "d.shape", "e.weight"]
    assert packed_modules([*names, "bitmask", "f.bitmasks"]) == ["a", "b", "c"]
