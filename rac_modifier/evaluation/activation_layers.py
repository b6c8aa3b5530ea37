"""Which layers of a checkpoint may have activations of 8 bits: those whose weights the CPU kernels multiply as integers.

Packed sparse checkpoints of int8 and int4 have such layers, and dense ones of int4, int3 and int2 (W4A16), which vLLM serves on
our kernels with `--quantization rac`. No weight is read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rac_modifier.checkpoint.dense_codes import BITS, OF_VOCABULARY, why_not_codes
from rac_modifier.checkpoint.files import TensorFiles
from rac_modifier.checkpoint.quantization_config import WORDS, WeightScheme, weight_schemes
from rac_modifier.checkpoint.record import RUN_RECORD_NAME
from rac_modifier.checkpoint.sparsity_config import (
    CONFIG_FILE,
    METHOD,
    QUANTIZATION_KEY,
    RAC_METHOD,
    packed_format,
)
from rac_modifier.errors import RacError
from rac_modifier.evaluation.activation_bits import QuantizedLayer
from rac_modifier.files import read_json
from rac_modifier.kernels.interface import EXPERT
from rac_modifier.kernels.plan import PlanRow, plan_checkpoint, plan_dense_codes

_STEP = "give the folder of a packed int8 or int4 checkpoint, or of a dense W4A16 one of compressed-tensors"


@dataclass(frozen=True)
class IntegerLayers:
    """The `layers` of a checkpoint to measure, and the reason of each other quantized module, which keeps 16 bits."""

    layers: list[QuantizedLayer]
    left_out: Mapping[str, str]

    def describe_left_out(self) -> list[str]:
        """One line per reason, with the number of modules and the first of them."""
        lines = []
        for reason, count in self.count_left_out().items():
            first = next(module for module, why in self.left_out.items() if why == reason)
            lines.append(
                f"left out: {f'{count} modules, such as {first}' if count > 1 else first}: {reason}"
            )
        return lines

    def count_left_out(self) -> dict[str, int]:
        """How many modules are left out for each reason."""
        return dict(Counter(self.left_out.values()))


def quantized_layers(folder: Path, *, recorded: bool = True) -> IntegerLayers:
    """The linear layers of a checkpoint that the CPU kernels multiply as integers.

    `recorded`: with the own errors of its run record; without, these are still to be measured.

    Raises:
        RacError: no checkpoint with such layers, or, with `recorded`, one whose run record lacks the errors.
    """
    if not (folder / CONFIG_FILE).is_file():
        raise RacError(
            f"{folder}: no folder of a checkpoint; {_STEP} (hf download ID --local-dir FOLDER makes one)"
        )
    config = read_json(folder / CONFIG_FILE)
    rows, left_out = (
        _packed(folder) if packed_format(config) is not None else _dense(folder, config)
    )
    found = {row.module: layer for row in rows if (layer := _layer(row)) is not None}
    left_out |= {
        row.module: "the kernels multiply its values as floats"
        for row in rows
        if row.module not in found
    }
    if not found:
        module, reason = next(iter(left_out.items()), ("", "it has no quantized linear layer"))
        raise RacError(
            f"{folder}: none of its layers may have activations of 8 bits ({module}{': ' * bool(module)}{reason}); quantize "
            "linear layers to int8 or int4"
        )
    own: dict[str, float] = {}
    if recorded:
        record = read_json(folder / RUN_RECORD_NAME) if (folder / RUN_RECORD_NAME).is_file() else {}
        own = {
            m["name"]: float(m["relative_error"])
            for m in record.get("modules") or []
            if "relative_error" in m
        }
        if missing := [module for module in found if module not in own]:
            raise RacError(
                f"{folder}: {RUN_RECORD_NAME} has no error of {missing[0]} ({len(missing)} layers in all), and 8 bits are "
                "compared with it; name the model that was quantized (--dense MODEL), or set RAC_ACTIVATIONS=int8 for all "
                "layers unmeasured"
            )
    layers = [
        QuantizedLayer(module, layer.block, own.get(module)) for module, layer in found.items()
    ]
    return IntegerLayers(layers, left_out)


def _layer(row: PlanRow) -> QuantizedLayer | None:
    """None where the kernels multiply floats; without its own error."""
    assert row.layer is not None
    return QuantizedLayer.of(
        row.module,
        row.layer.stored,
        row.layer.group,
        row.layer.columns,
        None,
        word_bits=row.layer.word_bits,
    )


def _packed(folder: Path) -> tuple[list[PlanRow], dict[str, str]]:
    """The packed modules, and those left out whatever their numbers are."""
    rows = [row for row in plan_checkpoint(folder) if row.layer is not None]
    experts = {
        row.module: "the kernel of routed experts takes 16 bits"
        for row in rows
        if EXPERT.search(row.module)
    }
    return [row for row in rows if row.module not in experts], experts


def _dense(folder: Path, config: Mapping[str, Any]) -> tuple[list[PlanRow], dict[str, str]]:
    """The dense modules of 2 to 4 bits, and those left out whatever their numbers are.

    Raises:
        RacError: no kernel reads what the checkpoint has.
    """
    quantization = config.get(QUANTIZATION_KEY)
    if not isinstance(quantization, Mapping):
        raise RacError(f"{folder}: its weights are neither quantized nor packed; {_STEP}")
    if (method := quantization.get("quant_method", METHOD)) not in (METHOD, RAC_METHOD):
        raise RacError(f"{folder}: quantized by {method!r}, of which no layer is measured; {_STEP}")
    reasons = {scheme: _why_not(scheme) for scheme in weight_schemes(quantization)}
    with_activations = [s for s in reasons if s.activations and s.kind == "int" and s.bits in BITS]
    if with_activations or None not in reasons.values():
        scheme = next(iter([*with_activations, *reasons]), None)
        what = (
            "it quantizes no weights"
            if scheme is None
            else f"{reasons[scheme]}: {scheme.describe()}"
        )
        raise RacError(
            f"{folder}: no kernel multiplies its dense weights with rounded activations ({what}); {_STEP}"
        )
    rows, left_out = [], {}
    for row in plan_dense_codes(folder):
        reason = _why_left_out(row)
        if reason is None:
            rows.append(row)
        else:
            left_out[row.module] = reason
    with TensorFiles(folder) as files:
        words = sorted(
            name.removesuffix(f".{WORDS}") for name in files.where if name.endswith(f".{WORDS}")
        )
    few = {row.module for row in rows} | left_out.keys()
    return rows, left_out | {
        module: "dense weights of its bits have no kernel" for module in words if module not in few
    }


def _why_not(scheme: WeightScheme) -> str | None:
    return why_not_codes(
        scheme.kind,
        scheme.bits,
        scheme.strategy,
        scheme.format,
        activations=scheme.activations is not None,
    )


def _why_left_out(row: PlanRow) -> str | None:
    """Why a dense module of few bits keeps 16 bits; None where it is measured."""
    if EXPERT.search(row.module):
        return "dense experts of few bits have no kernel"
    if OF_VOCABULARY.search(row.module):
        return "heads and embeddings take 16 bits"
    if row.layer is None:
        return row.decision.reason
    if row.layer.columns % row.layer.group:
        return f"its {row.layer.columns} columns are no multiple of its groups of {row.layer.group}"
    return None
