"""Bytes of a checkpoint, counted from its files and told apart by what they hold."""

from __future__ import annotations

import re
from pathlib import Path

from rac_modifier.checkpoint.files import TensorFiles
from rac_modifier.checkpoint.inspect import is_embedding

_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output)$")
# Last part of a tensor's name: what it holds.
_PARTS = {
    "weight": "values",
    "compressed": "values",
    "weight_packed": "values",
    "bitmask": "bitmask",
    "row_offsets": "offsets",
    "weight_scale": "scales",
    "weight_zero_point": "zero_points",
    "weight_g_idx": "order",
}
KINDS = ("values", "bitmask", "offsets", "scales", "zero_points", "order")
"""What the compressible matrices consist of; `order` is the group of each column, where columns were quantized by activation."""
APART = ("head", "embeddings", "other")
"""What is stated apart: `other` is norms, biases and shapes. A head that is tied to the embeddings has no bytes of its own."""


def checkpoint_bytes(folder: str | Path) -> dict[str, int | float]:
    """Bytes by `KINDS` and `APART`, their sums `matrices` and `total`, and `bits_per_weight` of the matrices.

    Raises:
        RacError: no safetensors, or a damaged file.
    """
    found: dict[str, int | float] = dict.fromkeys((*KINDS, *APART), 0)
    weights = 0
    with TensorFiles(folder) as files:
        for name in files.where:
            module, _, part = name.rpartition(".")
            kind = _PARTS.get(part, "other")
            if is_embedding(module):
                kind = "embeddings"
            elif _HEAD.search(module):
                kind = "head"
            elif part == "weight":
                shape = files.shape(name)
                kind = "values" if len(shape) == 2 else "other"
                weights += shape[0] * shape[1] if len(shape) == 2 else 0
            elif part in ("shape", "weight_shape"):
                rows, columns = files.tensor(name).flatten().tolist()
                weights += rows * columns
            found[kind] += files.nbytes(name)
    found["matrices"] = sum(found[kind] for kind in KINDS)
    found["total"] = found["matrices"] + sum(found[kind] for kind in APART)
    found["bits_per_weight"] = 8 * found["matrices"] / weights if weights else 0.0
    return found
