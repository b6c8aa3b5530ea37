"""The memory that recovery needs, checked before anything is sampled, and again when the traces are known.

Bytes per trained weight: float32 weight 4 (on a CPU less what the model took before), moments of AdamW 8, mask 1, and on the
CPU the best weights 4. A step's activations and gradients are counted by simulated_step.py. Where training runs on a GPU, the
state is copied to the CPU to be written: 12 more there. A quantized weight is trained through its code: scaled weight, code and
what is clamped are kept for the backward pass (9), and its master twice (8).

Of several processes each trains its part of the weights, and holds three whole layers: the one that runs, the next, and a
gradient. The first gathers the state to write it: 16.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from loguru import logger

from rac_modifier.errors import RacError
from rac_modifier.evaluation.teacher_forcing import TokenSequence
from rac_modifier.freed_memory import WITH_GAPS
from rac_modifier.processes import ALONE, Processes
from rac_modifier.pruning.linalg import bf16_is_fast
from rac_modifier.recovery.recomputing import decoder_layers
from rac_modifier.recovery.schedule import steps_of_run
from rac_modifier.recovery.simulated_step import step_bytes
from rac_modifier.recovery.trained_parameters import frozen_parameters
from rac_modifier.settings.recovery import RecoverySettings

_FLOAT32, _MOMENTS, _MASK, _BEST = 4, 8, 1, 4
_STATE = _FLOAT32 + _MOMENTS  # on its way from a GPU to the disk
_CODE, _MASTERS = 9, 8
_MARGIN = 0.9  # of the free memory
_GIB = 2**30


@dataclass(frozen=True)
class Batch:
    """A batch that is trained on.

    Attributes:
        rows, length: its sequences and their padded length.
        predicted: its completion tokens.
        follows: whether another batch of its step is before it, whose gradients are there meanwhile.
    """

    rows: int
    length: int
    predicted: int
    follows: bool = True

    @property
    def tokens(self) -> int:
        """With padding."""
        return self.rows * self.length


def batch_as_asked(settings: RecoverySettings) -> Batch:
    """Before traces are known: one sequence of as many tokens as a batch may have."""
    tokens = min(settings.batch_tokens, 2 * settings.step_tokens)
    return Batch(1, tokens, tokens - 1)


def largest_batches(
    training: Sequence[TokenSequence],
    settings: RecoverySettings,
    device: torch.device,
    processes: int,
) -> list[Batch]:
    """Of the very batches that will be trained on, the largest that begins a step, and the largest that follows one."""
    largest: dict[bool, Batch] = {}
    for step in steps_of_run(training, settings, device, processes):
        for number, sequences in enumerate(step.batches):
            lengths, completions = (
                [len(ids) for ids, _ in sequences],
                [len(ids) - prompt for ids, prompt in sequences],
            )
            batch = Batch(len(sequences), max(lengths), sum(completions), number > 0)
            if batch.follows not in largest or batch.tokens > largest[batch.follows].tokens:
                largest[batch.follows] = batch
    return sorted(largest.values(), key=lambda batch: -batch.tokens)


@dataclass(frozen=True)
class RecoveryNeed:
    """Bytes that training takes beside the model as it is loaded.

    Attributes:
        device: of each process, on the device that it trains on.
        host: on the CPU beside these, of all processes together.
        batch: the one whose step takes the most.
        step: activations and gradients at the peak of its step, part of `device`; None: not counted, since it needs data to run.
    """

    device: int
    host: int
    batch: Batch
    step: int | None

    @classmethod
    def of(
        cls,
        model: Any,
        settings: RecoverySettings,
        batches: Sequence[Batch],
        device: torch.device,
        *,
        processes: int = 1,
        quantizes: bool = False,
    ) -> RecoveryNeed:
        """What training this model takes.

        Args:
            model: in the dtype in which it is loaded.
            settings: whether activations are computed again.
            batches: the largest ones.
            device: where it trains.
            processes: that train together on this machine, each on a part of the sequences of a batch.
            quantizes: whether the weights of its linear layers are trained through codes.
        """
        frozen, whole = frozen_parameters(model), processes == 1
        parameters = list(model.parameters())
        trained = [p for p in parameters if p.is_floating_point() and id(p) not in frozen]
        count = sum(p.numel() for p in trained)
        checkpointing = settings.activation_checkpointing
        steps = {
            batch: _step_bytes(model, batch, device, checkpointing, processes) for batch in batches
        }
        batch = max(steps, key=lambda one: steps[one] or one.tokens)
        step = steps[batch]
        on_device = (_FLOAT32 + _MOMENTS + _MASK) * count
        if whole:
            on_device += _FLOAT32 * count if step is None else step
        else:
            layers = decoder_layers(model, "torchrun")
            layer = max(sum(p.numel() for p in layer.parameters()) for layer in layers)
            on_device = (
                (on_device + _FLOAT32 * count) // processes + 3 * _FLOAT32 * layer + (step or 0)
            )
        if quantizes:
            coded = sum(p.numel() for p in trained if p.dim() == 2)
            on_device += coded * (_MASTERS + (0 if checkpointing else _CODE))
        host = _BEST * count
        if device.type != "cpu":
            on_device += sum(p.nbytes for p in parameters if id(p) in frozen)
            host += _STATE * count
        elif whole:
            on_device -= sum(p.nbytes for p in trained)
        if device.type == "cpu":
            on_device += int((WITH_GAPS - 1) * (step or 0))
        if not whole:  # each loads the model, and has it once more while it is spread
            host += (
                2 * _FLOAT32 * processes + (_STATE + _BEST if device.type == "cpu" else _BEST)
            ) * count
        return cls(on_device, host, batch, step)


def check_recovery_memory(
    model: Any,
    settings: RecoverySettings,
    processes: Processes = ALONE,
    *,
    training: Sequence[TokenSequence] | None = None,
    quantizes: bool = False,
) -> RecoveryNeed:
    """Refuse to start where training all weights would not fit; all `processes` are taken to be on this machine.

    Args:
        model: the dense model.
        settings: of recovery.
        processes: that train together.
        training: the traces to train on, where they are known.
        quantizes: whether weights are trained through codes.

    Raises:
        RacError: naming bytes needed and free, and what to change.
    """
    device = processes.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    asked = [batch_as_asked(settings)]
    batches = (
        asked if training is None else largest_batches(training, settings, device, processes.count)
    )
    need = RecoveryNeed.of(
        model, settings, batches, device, processes=processes.count, quantizes=quantizes
    )
    if device.type == "cuda":
        _check(need.device, torch.cuda.mem_get_info(device)[0], "the GPU", settings, need)
        on_cpu = need.host
    else:
        on_cpu = processes.count * need.device + need.host
    _check(on_cpu, psutil.virtual_memory().available, "the CPU", settings, need)
    return need


def _step_bytes(
    model: Any, batch: Batch, device: torch.device, checkpointing: bool, processes: int
) -> int | None:
    rows = -(-batch.rows // processes)
    try:
        return step_bytes(
            model,
            rows,
            batch.length,
            batch.predicted * rows // batch.rows,
            autocast=torch.bfloat16 if bf16_is_fast(device) else None,
            checkpointing=checkpointing,
            micro_batches=2 if batch.follows else 1,
            keep_gradients=processes == 1,
        )
    except RuntimeError as error:  # of torch's fake tensors: no value is there to decide a shape by
        logger.warning(
            f"recovery: activations of {type(model).__name__} are not counted in the memory that is needed, since it does not "
            f"run without data ({error})"
        )
        return None


def _check(
    need: int, free: int, where: str, settings: RecoverySettings, counted: RecoveryNeed
) -> None:
    of_step = "activations are not counted"
    if counted.step is not None:
        of_step = f"{counted.step / _GIB:.1f} GiB of it for a step on {counted.batch.rows} x {counted.batch.length:,} tokens"
    message = f"recover: training needs about {need / _GIB:.1f} GiB on {where} beside the model ({of_step})"
    if need <= _MARGIN * free:
        logger.info(f"{message}; {free / _GIB:.1f} GiB are free")
        return
    steps = ["use a machine with more memory", "leave recover out"]
    if counted.step is not None and counted.step > need / 4:
        steps.insert(0, f"set recover.batch_tokens below {counted.batch.tokens:,}")
        if not settings.activation_checkpointing:
            steps.insert(0, "set recover.activation_checkpointing: true")
    raise RacError(f"{message}, and {free / _GIB:.1f} GiB are free; {', or '.join(steps)}")
