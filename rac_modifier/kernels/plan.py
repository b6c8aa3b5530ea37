"""What runs how, and why: for a layer while it is loaded, and for a whole checkpoint ahead of serving."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from rac_modifier.checkpoint.files import TensorFiles
from rac_modifier.checkpoint.formats import packed_modules
from rac_modifier.checkpoint.sparsity_config import CONFIG_FILE, ignored_modules, packed_format, recorded_structures
from rac_modifier.checkpoint.stored_weight import FLOATS, SCALE
from rac_modifier.errors import RacError
from rac_modifier.files import read_json
from rac_modifier.kernels import Decision, Support, choose

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def stay_dense(reason: str, dtype: torch.dtype) -> Decision:
    """A decision without a look at the kernels."""
    return Decision(False, "dense", f"dense because {reason}", float(dtype.itemsize), 1.0)


def kept_dtype(stored: torch.dtype, served: torch.dtype) -> torch.dtype:
    """The dtype that values are packed in: as stored where the served one is wider (the same numbers, fewer bytes)."""
    return stored if (stored, served) == (torch.bfloat16, torch.float32) else served


@dataclass(frozen=True)
class Form:
    """How stored values are packed for a kernel: as `dtype`, their scales beside them if `scaled`, else multiplied in."""

    dtype: torch.dtype
    scaled: bool = False
    note: str = ""


def form_of(stored: torch.dtype, group: int, columns: int, served: torch.dtype) -> Form:
    """The form for values of the dtype `stored` (int32: words of 4-bit values) of which `group` columns share a scale."""
    if stored in FLOATS:
        return Form(kept_dtype(stored, served))
    bits = {torch.int8: "int8", torch.int32: "int4"}.get(stored, "fp8")
    if stored in FP8 and group == columns:
        return Form(torch.bfloat16, True, "fp8 values as bfloat16, exactly")
    if stored in FP8 or (group < columns and group % 4):
        return Form(torch.bfloat16, False, f"{bits} values in groups of {group}, rounded to bfloat16")
    return Form(torch.int8, True, "int4 values, a byte each" if bits == "int4" else "")


@dataclass
class Summary:
    """The decisions of one model's layers; `add` returns the text to log when the last of the `expected` has come."""

    expected: int = 0
    decisions: dict[str, Decision] = field(default_factory=dict)

    def expect(self) -> None:
        """One more layer will be decided."""
        self.expected += 1

    def add(self, layer: str, decision: Decision) -> str | None:
        """Note a layer's decision."""
        self.decisions[layer] = decision
        return self.render() if len(self.decisions) == self.expected else None

    def render(self) -> str:
        """One line for each kernel and each reason to stay dense."""
        sparse = [d for d in self.decisions.values() if d.sparse]
        lines = [f"rac-sparse: {len(sparse)} of {len(self.decisions)} pruned layers run on a sparse kernel"]
        for kernel, count in Counter(d.kernel for d in sparse).items():
            of_kernel = [d for d in sparse if d.kernel == kernel]
            low, high = min(d.bytes_per_weight for d in of_kernel), max(d.bytes_per_weight for d in of_kernel)
            gain = max(d.ceiling for d in of_kernel)
            lines.append(
                f"  {kernel}: {_layers(count)}, {low:.2f}-{high:.2f} bytes a weight, at most {gain:.2f}x faster"
            )
        for reason, count in Counter(d.reason for d in self.decisions.values() if not d.sparse).items():
            first = next(name for name, d in self.decisions.items() if d.reason == reason)
            lines.append(f"  {reason}: {_layers(count)}, such as {first}")
        return "\n".join(lines)


def _layers(count: int) -> str:
    return f"{count} layer" + ("s" if count != 1 else "")


@dataclass(frozen=True)
class PlanRow:
    """One linear module of a checkpoint and how it will run here. `density` is the share of weights stored."""

    module: str
    rows: int
    columns: int
    density: float
    decision: Decision


def plan_row(
    module: str,
    rows: int,
    columns: int,
    stored: int,
    dtype: torch.dtype,
    served: torch.dtype,
    support: Support | None = None,
    groups: int = 1,
) -> PlanRow:
    """Decide for a packed module from numbers alone: `stored` values of `dtype`, served in `served`.

    int32 is words of 4-bit values; `groups` are the scales of a row.
    """
    density = stored / (rows * columns) if rows > 0 and columns > 0 else -1.0
    form = form_of(dtype, columns // max(groups, 1), columns, served)
    return PlanRow(
        module, rows, columns, density, choose(rows, columns, density, form.dtype, support, form.note, served)
    )


def plan_checkpoint(
    folder: str | Path, dtype: torch.dtype | None = None, support: Support | None = None
) -> list[PlanRow]:
    """How each pruned or ignored linear module of a checkpoint would run on this machine, without reading its weights.

    vLLM fuses q, k, v and gate, up; those then get one decision together, on the same grounds. `dtype` is the one to
    serve in, by default each weight's own.

    Raises:
        RacError: no readable checkpoint, or a packed module whose tensors do not fit together.
    """
    config = read_json(Path(folder) / CONFIG_FILE)
    packed_format(config)  # refuses a format that cannot be served
    with TensorFiles(folder) as files:
        rows = [_packed_row(files, module, dtype, support) for module in packed_modules(files.where)]
        dense = {
            **dict.fromkeys(ignored_modules(config), "it is not pruned (in ignore)"),
            **dict.fromkeys(recorded_structures(config), "it is stored dense; serve with --quantization rac-sparse"),
        }
        done = {row.module for row in rows}
        for module, reason in sorted(dense.items()):
            if module not in done and f"{module}.weight" in files and len(files.shape(f"{module}.weight")) == 2:
                n, k = files.shape(f"{module}.weight")
                rows.append(PlanRow(module, n, k, 1.0, stay_dense(reason, files.dtype(f"{module}.weight"))))
    return rows


def render_plan(rows: Sequence[PlanRow]) -> str:
    """One line for each way to run and each reason, with how many modules and which is the first of them."""
    lines = []
    for reason in dict.fromkeys(row.decision.reason for row in rows):
        alike = [row for row in rows if row.decision.reason == reason]
        named = f"{len(alike)} modules, from {alike[0].module}" if len(alike) > 1 else alike[0].module
        lines.append(f"{named} ({alike[0].rows}x{alike[0].columns}): {reason}")
    return "\n".join(lines)


def _packed_row(files: TensorFiles, module: str, dtype: torch.dtype | None, support: Support | None) -> PlanRow:
    shape = files.tensor(f"{module}.shape") if files.shape(f"{module}.shape") in ((2,), (2, 1)) else torch.zeros(0)
    own, stored_shape = files.dtype(f"{module}.compressed"), files.shape(f"{module}.compressed")
    rows, columns = shape.flatten().tolist() if shape.dtype == torch.int64 else (0, 0)
    stored = math.prod(stored_shape)
    if own == torch.int32:  # words of eight values; the last of a row, or of all, may be filled up
        stored = min(rows * columns // 2 if len(stored_shape) == 2 else 8 * stored, rows * columns)
    if min(rows, columns) < 1 or stored > rows * columns:
        raise RacError(f"{module}.shape: does not fit the {stored} stored values; the checkpoint is damaged")
    scale = files.shape(f"{module}.{SCALE}") if f"{module}.{SCALE}" in files else ()
    groups = scale[1] if len(scale) == 2 else 1
    return plan_row(module, rows, columns, stored, own, dtype or _served(own), support, groups)


def _served(stored: torch.dtype) -> torch.dtype:
    return stored if stored in FLOATS else torch.bfloat16
