"""How each module of a checkpoint would run on this machine, decided ahead of serving without reading its weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from rac_modifier.checkpoint.dense_codes import BITS, ORDER, ZEROS
from rac_modifier.checkpoint.files import TensorFiles
from rac_modifier.checkpoint.formats import FORMAT_24, packed_modules
from rac_modifier.checkpoint.int32_words import word_count
from rac_modifier.checkpoint.quantization_config import WORDS, WORDS_SHAPE
from rac_modifier.checkpoint.sparsity_config import (
    CONFIG_FILE,
    SparsityRecord,
    ignored_modules,
    packed_format,
    recorded_structures,
)
from rac_modifier.checkpoint.stored_weight import FLOATS, SCALE
from rac_modifier.errors import RacError
from rac_modifier.files import read_json
from rac_modifier.kernels.choose import choose
from rac_modifier.kernels.interface import Decision, Layer, stay_dense


@dataclass(frozen=True)
class PlanRow:
    """One linear module of a checkpoint and how it would run. `density` is the share of weights stored.

    `layer`: the numbers that were decided on; None where no backend was asked.
    """

    module: str
    rows: int
    columns: int
    density: float
    decision: Decision
    layer: Layer | None = None


def plan_row(
    module: str,
    rows: int,
    columns: int,
    stored: int,
    dtype: torch.dtype,
    served: torch.dtype,
    groups: int = 1,
    device: str = "cpu",
    two_of_four: bool = False,
    scale_bytes: int = 4,
    activation_bits: int = 16,
    word_bits: int = 4,
) -> PlanRow:
    """Decide for a packed module from numbers alone: `stored` values of `dtype`, served in `served` on a device type.

    int32 stands for words of values of `word_bits`; `groups` is the number of scales per row, each of `scale_bytes`;
    `two_of_four`: the weight is 2:4. `activation_bits`: 8 where the checkpoint records that these are enough.
    """
    density = stored / (rows * columns) if rows > 0 and columns > 0 else -1.0
    group = columns // max(groups, 1)
    layer = Layer(
        *(rows, columns, density, dtype, served, group, scale_bytes),
        two_of_four=two_of_four,
        activation_bits=activation_bits,
        word_bits=word_bits,
    )
    decision, _ = choose(layer, device)
    return PlanRow(module, rows, columns, density, decision, layer)


def plan_checkpoint(
    folder: str | Path, dtype: torch.dtype | None = None, device: str = "cpu"
) -> list[PlanRow]:
    """How each pruned or ignored linear module of a checkpoint would run on a device type of this machine.

    vLLM fuses q, k, v and gate, up; each fused layer then gets one decision, by the same rules. `dtype` is the one to
    serve in, by default each weight's own.

    Raises:
        RacError: no readable checkpoint, or a packed module whose tensors do not fit together.
    """
    config = read_json(Path(folder) / CONFIG_FILE)
    two_of_four = packed_format(config) == FORMAT_24  # raises for a format that cannot be served
    with TensorFiles(folder) as files:
        int8 = SparsityRecord.of(config).int8_activations
        rows = [
            _packed_row(files, module, dtype, device, two_of_four, 8 if module in int8 else 16)
            for module in packed_modules(files.where)
        ]
        dense = {
            **dict.fromkeys(ignored_modules(config), "it is not pruned (in ignore)"),
            **dict.fromkeys(
                recorded_structures(config),
                "it is stored dense; serve with --quantization rac",
            ),
        }
        done = {row.module for row in rows}
        for module, reason in sorted(dense.items()):
            if (
                module not in done
                and f"{module}.weight" in files
                and len(files.shape(f"{module}.weight")) == 2
            ):
                n, k = files.shape(f"{module}.weight")
                rows.append(
                    PlanRow(module, n, k, 1.0, stay_dense(reason, files.dtype(f"{module}.weight")))
                )
    return rows


def plan_dense_codes(folder: str | Path, device: str = "cpu") -> list[PlanRow]:
    """How each module of 2-, 3- or 4-bit weights without a mask would run with `vllm serve --quantization rac`.

    Raises:
        RacError: no readable checkpoint, or sizes that cannot be.
    """
    rows = []
    int8 = SparsityRecord.of(read_json(Path(folder) / CONFIG_FILE)).int8_activations
    with TensorFiles(folder) as files:
        for module in sorted(
            name.removesuffix(f".{WORDS}") for name in files.where if name.endswith(f".{WORDS}")
        ):
            parts = {part: f"{module}.{part}" for part in (WORDS, WORDS_SHAPE, SCALE, ZEROS, ORDER)}
            if parts[WORDS_SHAPE] not in files or files.shape(parts[WORDS_SHAPE]) != (2,):
                continue
            n, k = files.tensor(parts[WORDS_SHAPE]).tolist()
            words = files.shape(parts[WORDS])
            bits = (
                next((b for b in reversed(BITS) if words == (n, word_count(k, b))), None)
                if min(n, k) > 0
                else None
            )
            if bits is None:  # other bits, or damaged
                continue
            if parts[ORDER] in files:
                decision = stay_dense(
                    "its columns were reordered (actorder: group)", torch.bfloat16
                )
                rows.append(PlanRow(module, n, k, 1.0, decision))
                continue
            groups = files.shape(parts[SCALE])[-1] if parts[SCALE] in files else 1
            scale_bytes = files.dtype(parts[SCALE]).itemsize if parts[SCALE] in files else 4
            numbers = (module, n, k, n * k, torch.int32, torch.bfloat16, groups, device)
            few = 8 if module in int8 else 16
            rows.append(
                plan_row(*numbers, scale_bytes=scale_bytes, activation_bits=few, word_bits=bits)
            )
    return rows


def render_plan(rows: Sequence[PlanRow]) -> str:
    """One line per decision, with the number of modules and the first of them."""
    lines = []
    for reason in dict.fromkeys(row.decision.reason for row in rows):
        alike = [row for row in rows if row.decision.reason == reason]
        named = (
            f"{len(alike)} modules, from {alike[0].module}" if len(alike) > 1 else alike[0].module
        )
        lines.append(f"{named} ({alike[0].rows}x{alike[0].columns}): {reason}")
    return "\n".join(lines)


def _packed_row(
    files: TensorFiles,
    module: str,
    dtype: torch.dtype | None,
    device: str,
    two_of_four: bool,
    activation_bits: int,
) -> PlanRow:
    shape = (
        files.tensor(f"{module}.shape")
        if files.shape(f"{module}.shape") in ((2,), (2, 1))
        else torch.zeros(0)
    )
    own, stored_shape = files.dtype(f"{module}.compressed"), files.shape(f"{module}.compressed")
    rows, columns = shape.flatten().tolist() if shape.dtype == torch.int64 else (0, 0)
    stored = math.prod(stored_shape)
    if (
        own == torch.int32
    ):  # words of eight values; the last one of a row, or of all, may have padding
        stored = min(rows * columns // 2 if len(stored_shape) == 2 else 8 * stored, rows * columns)
    if min(rows, columns) < 1 or stored > rows * columns:
        raise RacError(
            f"{module}.shape: does not fit the {stored} stored values; the checkpoint is damaged"
        )
    scale = f"{module}.{SCALE}"
    shape_of_scale = files.shape(scale) if scale in files else ()
    groups = shape_of_scale[1] if len(shape_of_scale) == 2 else 1
    scale_bytes = 2 if scale in files and files.dtype(scale) == torch.bfloat16 else 4
    served = dtype or _served(own)
    sizes = (
        rows,
        columns,
        stored,
        own,
        served,
        groups,
        device,
        two_of_four,
        scale_bytes,
        activation_bits,
    )
    return plan_row(module, *sizes)


def _served(stored: torch.dtype) -> torch.dtype:
    return stored if stored in FLOATS else torch.bfloat16
