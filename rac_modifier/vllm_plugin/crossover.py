"""Up to how many rows of activations the CPU kernels multiply themselves: timed once per model on this machine, or set.

The process that makes the config does it (`maybe_update_config`), and the config is sent to all ranks with the result. What is
set holds for every model of a process, with its head and its draft. What is measured holds for the kinds of weight that were
measured: a model without a kind leaves what another model of the process measured for it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

from vllm.logger import init_logger

from rac_modifier.errors import RacError
from rac_modifier.kernels.cpu.crossover import measure_crossovers
from rac_modifier.kernels.cpu.library import BYTE_ISAS
from rac_modifier.kernels.cpu.operator import EIGHT_BITS, FEW, KINDS, use_crossovers
from rac_modifier.kernels.cpu.support import support

__all__ = ["VARIABLE", "crossovers", "use_crossovers", "wanted_rows"]

logger = init_logger(f"vllm.{__name__}")
VARIABLE = "RAC_CROSSOVER"


def wanted_rows() -> float | None:
    """Rows that the environment sets for all layers; None where they are to be measured.

    Raises:
        RacError: it sets something else, or fewer rows than the kernels multiply themselves in any case.
    """
    wanted = os.environ.get(VARIABLE) or None
    if wanted is None:
        # Both ways round differently: with one of them a token has the same bits in a short and in a long prompt.
        return math.inf if os.environ.get("VLLM_BATCH_INVARIANT", "0") not in ("", "0") else None
    if wanted != "inf" and not (wanted.isascii() and wanted.isdecimal()):
        raise RacError(
            f'{VARIABLE}="{wanted}": give a number of rows up to which the kernels multiply, inf for any number, or unset it to '
            "have it measured"
        )
    if float(wanted) < FEW:
        raise RacError(
            f'{VARIABLE}="{wanted}": the kernels always multiply up to {FEW} rows themselves; give {FEW} or more, inf for any '
            "number, or unset it to have it measured"
        )
    return float(wanted)


def crossovers(kinds: Sequence[str], eight_bits: bool = False) -> dict[str, float]:
    """Rows by kind of weight (`kernels.cpu.operator.KINDS`), set for all or measured and logged; empty where no kernel runs.

    `kinds`: of "floats", "int8" and "int4", those of the model. `eight_bits`: it has layers with activations of 8 bits, too. The
    portable kernel is too slow to be timed: its number is fixed.

    Raises:
        RacError: RAC_CROSSOVER is no number, too small, or has no effect here.
    """
    wanted, available = wanted_rows(), support()
    if available.isa is None:
        if os.environ.get(VARIABLE):
            raise RacError(
                f"{VARIABLE}: no layer runs on a CPU kernel here ({available.reason}), so it has no effect; unset it"
            )
        return {}
    if wanted is not None:
        return dict.fromkeys(KINDS, wanted)
    if available.isa == "portable":
        return {}
    if eight_bits and available.isa in BYTE_ISAS:
        kinds = [*kinds, *(f"{kind}{EIGHT_BITS}" for kind in kinds if kind != "floats")]
    found = measure_crossovers(kinds)
    logger.info(
        "%s",
        "\n  ".join(
            ["rac: measured on a core of this machine", *(each.describe() for each in found)]
        ),
    )
    return {each.kind: each.rows for each in found}
