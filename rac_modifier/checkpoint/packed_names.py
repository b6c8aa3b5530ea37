"""Whether the tensors of a checkpoint are those that its config.json describes, by their names and dtypes alone."""

from __future__ import annotations

import torch

from rac_modifier.checkpoint.files import TensorFiles
from rac_modifier.checkpoint.formats import PARTS, packed_modules
from rac_modifier.checkpoint.quantization_config import WORDS, WeightScheme, stores_words
from rac_modifier.errors import RacError


def check_packed(
    files: TensorFiles, format: str | None, schemes: tuple[WeightScheme, ...] = ()
) -> list[str]:
    """Check the names and dtypes of packed tensors; which packed modules are int32 words to upstream.

    Raises:
        RacError: config.json's `format` and the tensors contradict each other, or a packed module lacks a part.
    """
    modules = packed_modules(files.where)
    if format is None:
        if modules:
            raise RacError(
                f"{files.folder}: {modules[0]} is packed but config.json has no sparsity_config; restore the "
                "config.json that packing wrote"
            )
        return []
    if not modules:
        raise RacError(
            f"{files.folder}: config.json says {format}, but no tensor is packed; copy the whole model again"
        )
    parts = {f"{module}.{part}" for module in modules for part in PARTS[format]}
    if lost := sorted(parts - files.where.keys()):
        raise RacError(f"{lost[0]}: missing from {files.folder}; copy or save the checkpoint again")
    for module in modules:
        for part in ("weight", WORDS):
            if f"{module}.{part}" in files:
                raise RacError(
                    f"{module}.{part}: stored both dense and packed in {files.folder}; save the model again"
                )
    bits = {
        module: {torch.int32: 4, torch.int8: 8}.get(files.dtype(f"{module}.compressed"), 0)
        for module in modules
    }
    return [
        module
        for module in modules
        if bits[module] == 4 or (bits[module] == 8 and stores_words(8, schemes))
    ]
