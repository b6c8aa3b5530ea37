"""The memory that recovery needs, checked before anything is sampled."""

from __future__ import annotations

from typing import Any

import psutil
import torch

from rac_modifier.errors import RacError

# Per trained weight, in bytes: the float32 weight, its gradient, both moments of Adam.
_TRAINED = 4 * 4
# On the CPU: the best weights so far, and a copy while the state is written.
_KEPT = 4 * 4
_MARGIN = 0.9  # of the free memory


def recovery_bytes(parameters: int, processes: int = 1) -> tuple[int, int]:
    """Bytes on the device of each process, and bytes on the CPU of all of them, for so many trained weights.

    On the CPU are the best weights and the state; with several processes also each one's whole float32 model, and that once
    more while it is spread. Activations are not counted: batches of recover.batch_tokens tokens keep them small beside these.
    """
    whole = 0 if processes == 1 else 2 * 4 * processes
    return _TRAINED * parameters // processes, (_KEPT + whole) * parameters


def check_recovery_memory(model: Any, processes: int = 1) -> None:
    """Refuse to start where training all weights would not fit; all `processes` are taken to be on this machine.

    Raises:
        RacError: naming bytes needed and free, and what to change.
    """
    count = sum(p.numel() for p in model.parameters() if p.is_floating_point())
    on_device, on_cpu = recovery_bytes(count, processes)
    free = psutil.virtual_memory().available
    where = "the CPU"
    if torch.cuda.is_available():
        if on_device > _MARGIN * torch.cuda.mem_get_info()[0]:
            raise RacError(_message(on_device, torch.cuda.mem_get_info()[0], "the GPU"))
        need = on_cpu
    else:
        need = processes * on_device + on_cpu
    if need > _MARGIN * free:
        raise RacError(_message(need, free, where))


def _message(need: int, free: int, where: str) -> str:
    return (
        f"recover: training needs about {need / 2**30:.1f} GiB on {where}, and {free / 2**30:.1f} GiB are free; use a machine "
        "with more memory, or leave recover out"
    )
