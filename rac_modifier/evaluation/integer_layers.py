"""Which layers of a checkpoint the CPU kernels multiply as integers, so that their inputs may have 8 bits.

Packed sparse checkpoints of int8 and int4 have such layers, and dense ones of int4, int3 and int2
(W4A16), which vLLM serves on our kernels with `--quantization rac`. No weight is read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch

from rac_modifier.checkpoint.dense_codes import BITS, OF_VOCABULARY, why_not_codes
from rac_modifier.checkpoint.quantization_config import weight_schemes
from rac_modifier.checkpoint.record import RUN_RECORD_NAME
from rac_modifier.checkpoint.sparsity_config import (
    CONFIG_FILE,
    METHOD,
    QUANTIZATION_KEY,
    RAC_METHOD,
    packed_format,
)
from rac_modifier.errors import RacError
from rac_modifier.files import read_json
from rac_modifier.kernels.cpu.encoding import UNIT, encoding_of
from rac_modifier.kernels.cpu.packed import block_of
from rac_modifier.kernels.interface import EXPERT
from rac_modifier.kernels.plan import PlanRow, plan_checkpoint, plan_dense_codes

_STEP = (
    "give the folder of a packed int8 or int4 checkpoint, or of a dense W4A16 one of "
    "compressed-tensors"
)


@dataclass(frozen=True)
class IntegerLayer:
    """A layer that the CPU kernels multiply as integers. `block`: columns of x that share a scale.

    own_error: ||W x - Q x||^2 / ||W x||^2 for the weight W before and Q after pruning and rounding;
    None until it is measured. error: ||Q (x8 - x16)||^2 / ||Q x16||^2, for x rounded to 8 and 16 bits.
    """

    module: str
    block: int
    own_error: float | None
    error: float = float("nan")

    @classmethod
    def of(
        cls,
        module: str,
        stored: torch.dtype,
        group: int,
        columns: int,
        own_error: float | None,
        word_bits: int = 4,
    ) -> Self | None:
        """Return the layer of values of dtype `stored` (int32.

        Words of `word_bits` bits) in groups of columns.

        None where the CPU kernels multiply floats, and for a routed expert, whose inputs keep 16 bits.
        """
        encoding = encoding_of(stored, group, columns, torch.bfloat16, word_bits)
        if EXPERT.search(module) or encoding.dtype != torch.int8:
            return None
        return cls(module, block_of(columns, group, UNIT[encoding.bits]), own_error)

    @property
    def share(self) -> float:
        """Error of 8 bits over the layer's own error; infinite where that is zero."""
        return self.error / self.own_error if self.own_error else float("inf")


def layers_of(folder: Path, *, recorded: bool = True) -> tuple[list[IntegerLayer], dict[str, int]]:
    """Return the linear layers of a checkpoint that the CPU kernels multiply as integers.

    No weight is read.

    `recorded`: with the own errors of its run record; without, these are still to be measured.

    Returns:
        The layers, and how many other compressed modules keep 16 bits for each reason.

    Raises:
        RacError: no checkpoint with such layers, or, with `recorded`, its run record lacks an error.
    """
    if not (folder / CONFIG_FILE).is_file():
        raise RacError(
            f"{folder}: no folder of a checkpoint; {_STEP} (hf download ID --local-dir FOLDER makes "
            "one)"
        )
    config = read_json(folder / CONFIG_FILE)
    if packed_format(config) is not None:
        rows = [row for row in plan_checkpoint(folder) if row.layer is not None]
    else:
        _check_dense(folder, config)
        rows = plan_dense_codes(folder)
    layers, left_out = [], {}
    for row in rows:
        layer = _layer(row)
        if isinstance(layer, str):
            left_out[row.module] = layer
        else:
            layers.append(layer)
    if not layers:
        module, reason = next(iter(left_out.items()), ("", "it has no quantized linear layer"))
        raise RacError(
            f"{folder}: none of its layers may have activations of 8 bits "
            f"({module}{': ' * bool(module)}{reason}); quantize linear layers to int8 or int4"
        )
    if recorded:
        layers = _with_recorded_errors(folder, layers)
    return layers, dict(Counter(left_out.values()))


def _layer(row: PlanRow) -> IntegerLayer | str:
    """Return the layer of a row, or why its activations keep 16 bits."""
    if EXPERT.search(row.module):
        return "routed experts take 16 bits"
    if OF_VOCABULARY.search(row.module):
        return "heads and embeddings take 16 bits"
    if row.layer is None:
        return row.decision.reason
    columns, group, stored = row.layer.columns, row.layer.group, row.layer.stored
    if columns % group:
        return f"its {columns} columns are no multiple of its groups of {group}"
    layer = IntegerLayer.of(row.module, stored, group, columns, None, row.layer.word_bits)
    return layer or "the kernels multiply its values as floats"


def _check_dense(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse a checkpoint without dense weights of 2 to 4 bits, or with quantized activations next to them."""
    quantization = config.get(QUANTIZATION_KEY)
    if not isinstance(quantization, Mapping):
        raise RacError(f"{folder}: its weights are neither quantized nor packed; {_STEP}")
    if (method := quantization.get("quant_method", METHOD)) not in (METHOD, RAC_METHOD):
        raise RacError(f"{folder}: quantized by {method!r}, of which no layer is measured; {_STEP}")
    reasons = {}
    for scheme in weight_schemes(quantization):
        rounds = scheme.activations is not None
        numbers = (scheme.kind, scheme.bits, scheme.strategy, scheme.format)
        reasons[scheme] = why_not_codes(*numbers, activations=rounds)
        if rounds and scheme.kind == "int" and scheme.bits in BITS:
            reasons = {scheme: reasons[scheme]}
            break
    if None not in reasons.values():
        what = next(
            (f"{why}: {s.describe()}" for s, why in reasons.items()), "it quantizes no weights"
        )
        raise RacError(
            f"{folder}: no kernel multiplies its dense weights with rounded activations ({what}); "
            f"{_STEP}"
        )


def _with_recorded_errors(folder: Path, layers: list[IntegerLayer]) -> list[IntegerLayer]:
    path = folder / RUN_RECORD_NAME
    modules = (read_json(path) if path.is_file() else {}).get("modules") or []
    errors = {m["name"]: float(m["relative_error"]) for m in modules if "relative_error" in m}
    if missing := [layer.module for layer in layers if layer.module not in errors]:
        raise RacError(
            f"{folder}: {RUN_RECORD_NAME} has no error of {missing[0]} ({len(missing)} layers in "
            "all), and 8 bits are compared with it; name the model that was quantized (--dense MODEL)"
        )
    return [replace(layer, own_error=errors[layer.module]) for layer in layers]
