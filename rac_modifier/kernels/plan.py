"""Decide how each module of a checkpoint would run here, without reading its weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from rac_modifier.checkpoint.dense_codes import BITS, ORDER, WORDS, WORDS_SHAPE, word_count
from rac_modifier.checkpoint.files import TensorFiles
from rac_modifier.checkpoint.formats import FORMAT_24, packed_modules
from rac_modifier.checkpoint.quantization_config import (
    CONFIG_FILE,
    QUANTIZATION_KEY,
    SparsityConfig,
    SparsityRecord,
)
from rac_modifier.checkpoint.stored_weight import FLOATS, SCALE
from rac_modifier.errors import RacError
from rac_modifier.files import read_json
from rac_modifier.kernels.choose import choose
from rac_modifier.kernels.interface import Decision, Layer, stay_dense


@dataclass(frozen=True)
class PlanRow:
    """A linear module of a checkpoint, and how it would run; `layer` None: no backend was asked."""

    module: str
    rows: int
    columns: int
    decision: Decision
    layer: Layer | None = None

    @classmethod
    def of(cls, module: str, layer: Layer) -> PlanRow:
        """Ask the CPU's backend."""
        return cls(module, layer.rows, layer.columns, choose(layer, "cpu")[0], layer)


def plan_checkpoint(folder: str | Path) -> list[PlanRow]:
    """Plan each pruned or ignored linear module of a checkpoint, served in its own dtype.

    vLLM decides for the fused layer of q, k and v, or of gate and up, by the same rules.
    """
    config = read_json(Path(folder) / CONFIG_FILE)
    sparsity, record = SparsityConfig.of(config.get(QUANTIZATION_KEY)), SparsityRecord.of(config)
    two_of_four = sparsity is not None and sparsity.format == FORMAT_24
    on_request = "it is stored dense; serve with --quantization rac"
    dense = dict.fromkeys(sparsity.ignore if sparsity else (), "it is not pruned (in ignore)")
    dense |= dict.fromkeys(record.modules, on_request)
    rows = []
    with TensorFiles(folder) as files:
        for module in packed_modules(files.where):
            dense.pop(module, None)
            bits = 8 if module in record.int8_activations else 16
            rows.append(PlanRow.of(module, _packed_layer(files, module, two_of_four, bits)))
        for module, reason in sorted(dense.items()):
            name = f"{module}.weight"
            if name in files and len(files.shape(name)) == 2:
                n, k = files.shape(name)
                rows.append(PlanRow(module, n, k, stay_dense(reason, files.dtype(name))))
    return rows


def plan_dense_codes(folder: str | Path) -> list[PlanRow]:
    """Plan each sound module of 2-, 3- or 4-bit weights without a mask, served by our kernels."""
    rows = []
    int8 = SparsityRecord.of(read_json(Path(folder) / CONFIG_FILE)).int8_activations
    with TensorFiles(folder) as files:
        for name in sorted(name for name in files.where if name.endswith(f".{WORDS}")):
            module = name.removesuffix(f".{WORDS}")
            shape = f"{module}.{WORDS_SHAPE}"
            if shape not in files or files.shape(shape) != (2,):
                continue
            n, k = files.tensor(shape).tolist()
            fitting = (b for b in reversed(BITS) if files.shape(name) == (n, word_count(k, b)))
            bits = next(fitting, None) if min(n, k) > 0 else None
            if bits is None:
                continue
            if f"{module}.{ORDER}" in files:
                reason = "its columns were reordered (actorder: group)"
                rows.append(PlanRow(module, n, k, stay_dense(reason, torch.bfloat16)))
                continue
            groups, scale_bytes = _scales(files, module)
            layer = Layer(
                *(n, k, 1.0, torch.int32, torch.bfloat16, k // groups, scale_bytes),
                activation_bits=8 if module in int8 else 16,
                word_bits=bits,
            )
            rows.append(PlanRow.of(module, layer))
    return rows


def render_plan(rows: Sequence[PlanRow]) -> str:
    """Return a line per decision, with the number of modules and the first of them."""
    lines = []
    for reason in dict.fromkeys(row.decision.reason for row in rows):
        alike = [row for row in rows if row.decision.reason == reason]
        first = alike[0]
        name = f"{len(alike)} modules, from {first.module}" if len(alike) > 1 else first.module
        lines.append(f"{name} ({first.rows}x{first.columns}): {reason}")
    return "\n".join(lines)


def _packed_layer(
    files: TensorFiles, module: str, two_of_four: bool, activation_bits: int
) -> Layer:
    """Read a packed module's numbers from its shape tensor and the header."""
    name = f"{module}.shape"
    shape = files.tensor(name) if files.shape(name) in ((2,), (2, 1)) else torch.zeros(0)
    rows, columns = shape.flatten().tolist() if shape.dtype == torch.int64 else (0, 0)
    values = files.dtype(f"{module}.compressed")
    stored_shape = files.shape(f"{module}.compressed")
    stored = math.prod(stored_shape)
    if values == torch.int32:  # words of eight values; the last word may have padding
        stored = min(rows * columns // 2 if len(stored_shape) == 2 else 8 * stored, rows * columns)
    if min(rows, columns) < 1 or stored > rows * columns:
        raise RacError(
            f"{name}: does not fit the {stored} stored values; the checkpoint is damaged"
        )
    groups, scale_bytes = _scales(files, module)
    return Layer(
        *(rows, columns, stored / (rows * columns), values),
        values if values in FLOATS else torch.bfloat16,
        *(columns // groups, scale_bytes),
        two_of_four=two_of_four,
        activation_bits=activation_bits,
    )


def _scales(files: TensorFiles, module: str) -> tuple[int, int]:
    """Return the groups per row (1 without scales) and the bytes of a packed scale."""
    name = f"{module}.{SCALE}"
    if name not in files:
        return 1, 4
    shape = files.shape(name)
    groups = shape[1] if len(shape) == 2 else 1
    return max(groups, 1), 2 if files.dtype(name) == torch.bfloat16 else 4
