"""Packed modules of a checkpoint: their names and scales against config.json, their weights."""

from __future__ import annotations

import torch

from rac_modifier.checkpoint.files import TensorFiles
from rac_modifier.checkpoint.formats import PARTS, check, packed_modules
from rac_modifier.checkpoint.quantization_config import WORDS, WeightScheme, stores_words
from rac_modifier.checkpoint.stored_weight import (
    FLOATS,
    SCALE,
    StoredWeight,
    check_scale,
    check_scale_values,
)
from rac_modifier.errors import RacError


def check_packed(
    files: TensorFiles, format: str | None, schemes: tuple[WeightScheme, ...] = ()
) -> list[str]:
    """Check names and dtypes of packed tensors; list the modules whose dense form is int32 words.

    `format` is that of config.json, None for dense weights; `schemes` are those of config.json.

    Raises:
        RacError: config.json and the tensors contradict each other, or a packed module lacks a
            part.
    """
    modules = packed_modules(files.where)
    if format is None:
        if modules:
            raise RacError(
                f"{files.folder}: {modules[0]} is packed but config.json has no sparsity_config; "
                "restore the config.json that packing wrote"
            )
        return []
    if not modules:
        raise RacError(
            f"{files.folder}: config.json says {format}, but no tensor is packed; "
            "copy the whole model again"
        )
    parts = {f"{module}.{part}" for module in modules for part in PARTS[format]}
    if lost := sorted(parts - files.where.keys()):
        raise RacError(f"{lost[0]}: missing from {files.folder}; copy or save the checkpoint again")
    for module in modules:
        for part in ("weight", WORDS):
            if f"{module}.{part}" in files:
                raise RacError(
                    f"{module}.{part}: stored both dense and packed in {files.folder}; "
                    "save the model again"
                )
    in_words = (torch.int32, torch.int8) if stores_words(8, schemes) else (torch.int32,)
    return [module for module in modules if files.dtype(f"{module}.compressed") in in_words]


def packed_weight(
    files: TensorFiles, format: str, module: str, schemes: tuple[WeightScheme, ...] = ()
) -> StoredWeight:
    """Read and check the weight of a packed module, and its scales where its values are quantized.

    Raises:
        RacError: as `PackedFormat.check`, and for a tensor that cannot be read.
    """
    parts = [part for part in PARTS[format] if f"{module}.{part}" in files]
    tensors = {part: files.tensor(f"{module}.{part}") for part in parts}
    weight = check(tensors, format, module, scaled=False)
    _check_scales(files, module, weight.values.dtype, weight.rows, weight.columns, schemes)
    return weight


def check_packed_scales(
    files: TensorFiles, modules: list[str], schemes: tuple[WeightScheme, ...]
) -> None:
    """Check the scales of packed modules before their weights are read.

    Raises:
        RacError: naming the scale that is missing, damaged, or of another shape than its weight.
    """
    for module in modules:
        dtype, shape = files.dtype(f"{module}.compressed"), files.tensor(f"{module}.shape")
        if shape.dtype == torch.int64 and shape.numel() == 2:  # else the weight names the damage
            rows, columns = shape.flatten().tolist()
            _check_scales(files, module, dtype, rows, columns, schemes)


def _check_scales(
    files: TensorFiles,
    module: str,
    dtype: torch.dtype,
    rows: int,
    columns: int,
    schemes: tuple[WeightScheme, ...],
) -> None:
    name = f"{module}.{SCALE}"
    tensors = {SCALE: files.tensor(name)} if name in files else {}
    # scales of blocks of rows and columns have another shape, which vLLM and transformers check
    if dtype not in FLOATS and tensors and any(s.strategy == "block" for s in schemes):
        check_scale_values(tensors[SCALE], name)
    else:
        check_scale(tensors, dtype, rows, columns, module)
