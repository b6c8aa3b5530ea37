"""Whether a grid fits: memory of the device, memory of the host, and disk, compared with what it will need at its peak.

The device holds the dense and the compressed model and, while answers are generated in this process, their keys and values; a
server has one model and the longest answer. The host holds a model while it is compressed and the activations that are kept
between groups of layers, for the dense and the pruned stream; that is checked again, per group, before anything is pruned. The
disk gets a checkpoint per row and the token ids of all answers.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from rac_modifier.errors import RacError
from rac_modifier.frontier.estimate import ModelShape, Plan

_PER_TOKEN = 8  # bytes of a token id in a file of answers
_STREAMS = 2


@dataclass(frozen=True)
class Room:
    """Bytes that are free: of the accelerator (None: there is none), of the host, and of the disk, and what is written."""

    device: int | None
    host: int
    disk: int

    @classmethod
    def here(cls, out: Path) -> Room:
        """Of this machine; `out` need not exist."""
        existing = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
        device = int(torch.cuda.mem_get_info()[0]) if torch.cuda.is_available() else None
        written = (
            sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
            if out.is_dir()
            else 0
        )
        return cls(
            device,
            int(psutil.virtual_memory().available),
            shutil.disk_usage(existing).free + written,
        )


@dataclass(frozen=True)
class Need:
    """Bytes that a run needs somewhere, what for, and what to change where they are not there."""

    where: str
    nbytes: int
    what_for: str
    next_step: str


def needs(plan: Plan, *, keep_models: bool) -> list[Need]:
    """What a plan needs of the device, the host and the disk."""
    shape = plan.shape
    here = max((_answers(shape, a.at_once, a.cap) for a in plan.asked if not a.served), default=0)
    server = max((_answers(shape, 1, a.cap) for a in plan.asked if a.served), default=0)
    device = max(2 * shape.nbytes + here, shape.nbytes + server)
    widest = max((group.columns for group in shape.groups), default=0)
    kept = _STREAMS * plan.tokens * (widest + shape.hidden) * shape.itemsize
    checkpoints = (
        (plan.rows if keep_models else 1) + 1
    ) * shape.nbytes  # one more while it is packed
    tokens = (plan.rows + 1) * sum(asked.answers * asked.cap for asked in plan.asked)
    return [
        Need(
            "device", device, "two models and a batch of answers", "lower evaluation.batch_size or evaluation.cap in the grid"
        ),
        Need("host", 2 * shape.nbytes + kept, "the models and activations", "lower calibration.tokens in the grid"),
        Need("disk", checkpoints + _PER_TOKEN * tokens, "checkpoints and answers", "free some, or use --remove-models"),
    ]  # fmt: skip


def check_room(found: Sequence[Need], room: Room) -> list[str]:
    """A line per need that is met, for the report. Without an accelerator, the host holds what it would.

    Raises:
        RacError: naming everything that does not fit, with what to change.
    """
    free = {"device": room.device, "host": room.host, "disk": room.disk}
    lines, wrong = [], []
    for need in found:
        where, available = need.where, free[need.where]
        if available is None:
            where, available = "host", room.host
        text = f"{where}: {_gib(need.nbytes)} are needed for {need.what_for}, {_gib(available)} are free"
        if need.nbytes > available:
            wrong.append(f"{text}; {need.next_step}")
        else:
            lines.append(text)
    if wrong:
        raise RacError("\n- ".join(["nothing was started, because this does not fit:", *wrong]))
    return lines


def _answers(shape: ModelShape, at_once: int, cap: int) -> int:
    return at_once * cap * shape.kv_bytes


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
