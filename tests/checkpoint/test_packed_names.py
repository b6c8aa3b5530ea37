"""Names and dtypes of packed tensors against what config.json describes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rac_modifier.checkpoint.files import TensorFiles
from rac_modifier.checkpoint.packed_names import check_packed
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
    with files(tmp_path, dtype) as found:
        assert check_packed(found, "sparse-24-bitmask", schemes) == in_words


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
    with files(tmp_path, **changes) as found, pytest.raises(RacError, match=message):
        check_packed(found, format)


def test_a_dense_checkpoint(tmp_path: Path) -> None:
    with files(tmp_path, up_compressed=None, up_bitmask=None, up_shape=None) as found:
        assert check_packed(found, None) == []
