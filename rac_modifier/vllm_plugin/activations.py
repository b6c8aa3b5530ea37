"""In how many bits a layer of integers multiplies its activations: 16, or 8 where nothing is lost.

`rac activations` measures which layers of a checkpoint lose nothing and writes them into its config.json. RAC_ACTIVATIONS=int16
leaves that record out; RAC_ACTIVATIONS=int8 takes 8 bits in every linear layer of integers, whatever was measured.
"""

from __future__ import annotations

import os

from rac_modifier.errors import RacError
from rac_modifier.kernels.cpu.library import BYTE_ISAS
from rac_modifier.kernels.cpu.support import support

VARIABLE = "RAC_ACTIVATIONS"
_BITS = {"int8": 8, "int16": 16}


def wanted_bits() -> int | None:
    """Bits that the environment requests for all layers; None where the checkpoint decides.

    Raises:
        RacError: it requests something else.
    """
    wanted = os.environ.get(VARIABLE) or None
    if wanted is not None and wanted not in _BITS:
        raise RacError(
            f'{VARIABLE}="{wanted}": activations can be int8 or int16; unset it to take what the checkpoint records'
        )
    return None if wanted is None else _BITS[wanted]


def check_effect(*, integers: bool, on_cpu: bool) -> None:
    """Refuse a request that changes nothing. `integers`: the checkpoint has weights of integers.

    Raises:
        RacError: its weights are floats, or RAC_ACTIVATIONS=int8 where no kernel multiplies bytes.
    """
    wanted = wanted_bits()
    if wanted is not None and not integers:
        raise RacError(
            f"{VARIABLE}: the weights of this checkpoint are floats, and activations are rounded for integers only; unset it"
        )
    available = support()
    if wanted == 8 and not (on_cpu and available.isa in BYTE_ISAS):
        here = available.reason if on_cpu else "this is not a CPU"
        raise RacError(
            f"{VARIABLE}=int8: only CPU kernels that multiply bytes ({', '.join(BYTE_ISAS)}) take activations of 8 bits; here: "
            f"{here}; unset it"
        )


def activation_bits(recorded: bool = False) -> int:
    """Bits of a layer's activations. `recorded`: the checkpoint says that this layer loses nothing with 8."""
    return wanted_bits() or (8 if recorded else 16)
