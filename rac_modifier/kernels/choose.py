"""Choose the backend of a layer, and of each compressed module of a checkpoint.

A backend is the CPU's, or an entry point of an installed package.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import cast

import torch

from rac_modifier.checkpoint.inspect import CheckpointReport, inspect_checkpoint
from rac_modifier.formats.module_names import Role
from rac_modifier.formats.quantization_config import (
    BITS,
    CONFIG_FILE,
    QUANTIZATION_KEY,
    SparsityRecord,
    weight_schemes,
    why_left_to_vllm,
)
from rac_modifier.formats.stored_weight import FLOATS, PER_BLOCK, REORDERED, StoredWeight
from rac_modifier.kernels import cpu
from rac_modifier.kernels.cpu import head
from rac_modifier.kernels.interface import (
    VLLMS,
    Backend,
    Decision,
    Layer,
    stay_dense,
)
from rac_modifier.runtime.files import read_json

GROUP = "rac_modifier.kernel_backends"
"""Entry points: the name is a device type of torch, the value a backend module."""
BACKENDS: dict[str, Backend] = {"cpu": cpu}


def choose(layer: Layer, device: str) -> tuple[Decision, Backend | None]:
    """Decide how a layer runs on a device type such as "cpu"; backend None: dense."""
    backend = BACKENDS.get(device) or _from_entry_point(device)
    if isinstance(backend, str):
        return stay_dense(backend, layer.served), None
    decision = backend.can_run(layer)
    return decision, backend if decision.sparse else None


def serve(
    weight: StoredWeight, layer: Layer, device: str, role: Role = Role.LINEAR
) -> tuple[Decision, Backend | None]:
    """Decide how a weight that was read, or a share of it (`layer`), runs.

    `rac inspect` and the vLLM plugin both ask this function.
    """
    if weight.per_block:
        return stay_dense(PER_BLOCK, layer.served, "refused by vLLM"), None
    if weight.order is not None and role is not Role.LINEAR:
        return stay_dense(REORDERED, layer.served), None
    if role is Role.HEAD and device == "cpu" and head.can_split(layer):
        decision = head.can_run(layer)
        return decision, head if decision.sparse else None
    return choose(layer, device)


@lru_cache(maxsize=16)
def _from_entry_point(device: str) -> Backend | str:
    """Import the backend that an installed package names for a device type."""
    for point in entry_points(group=GROUP, name=device):
        package = point.dist.name if point.dist is not None else point.value
        try:
            return cast(Backend, point.load())
        except Exception as error:  # a foreign package: the layer runs dense
            return f"the backend of {package} cannot be imported ({type(error).__name__}: {error})"
    return f"there is no sparse kernel for {device}"


@dataclass(frozen=True)
class PlanRow:
    """A compressed linear module of a checkpoint, and how it would run."""

    module: str
    layer: Layer
    decision: Decision


def plan_checkpoint(folder: str | Path) -> tuple[CheckpointReport, list[PlanRow]]:
    """Inspect a checkpoint; plan packed modules, dense codes of 2 to 4 bits, an int8 head.

    vLLM decides for fused layers by the same rules. Damaged modules are in the report alone.
    """
    config = read_json(Path(folder) / CONFIG_FILE)
    quantization, int8 = config.get(QUANTIZATION_KEY), SparsityRecord.of(config).int8_activations
    schemes = weight_schemes(quantization)
    rows: list[PlanRow] = []

    def plan(weight: StoredWeight) -> None:
        dtype, role = weight.values.dtype, Role.of(weight.name)
        served = dtype if dtype in FLOATS else torch.bfloat16
        is_dense = weight.density == 1.0
        if is_dense and weight.bits not in BITS and not role.of_vocabulary:
            return
        weight = replace(weight, activation_bits=8 if weight.name in int8 else 16)
        layer = Layer.of(weight, served)
        known = (scheme for scheme in schemes if scheme.encoding.bits == weight.bits)
        reason = why_left_to_vllm(quantization, known, role.of_vocabulary)
        if is_dense and not weight.per_block and reason is not None:
            decision = stay_dense(reason, served, VLLMS)
        else:
            decision, _ = serve(weight, layer, "cpu", role)
        rows.append(PlanRow(weight.name, layer, decision))

    return inspect_checkpoint(folder, plan), rows


def render_plan(rows: Sequence[PlanRow]) -> str:
    """Return a line per decision, with the number of modules and the first of them."""
    lines = []
    for reason in dict.fromkeys(row.decision.reason for row in rows):
        alike = [row for row in rows if row.decision.reason == reason]
        first = alike[0]
        name = f"{len(alike)} modules, from {first.module}" if len(alike) > 1 else first.module
        lines.append(f"{name} ({first.layer.rows}x{first.layer.columns}): {reason}")
    return "\n".join(lines)
