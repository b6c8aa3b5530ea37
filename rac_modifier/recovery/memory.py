"""Forecast the memory of recovery: refuse a run that does not fit, before sampling and again when the traces are known.

Bytes per trained weight: float32 weight 4, moments of AdamW 8, mask 1, and on the CPU the best weights 4. A quantized weight is
trained through its code: its master twice (8), and code, scaled weight and clamp for the backward pass (9). A GPU's state is
copied to the CPU to be written (12). Activations, gradients and loss of a step are rehearsed (rehearsal.py).

Each of several processes trains a part of the weights and holds three whole layers: the one that runs, the next, a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import psutil
import torch
from loguru import logger

from rac_modifier.errors import RacError
from rac_modifier.evaluation.teacher_forcing import TokenSequence
from rac_modifier.platform import HEAP_GAPS
from rac_modifier.processes import ALONE, Processes
from rac_modifier.pruning.linalg import bf16_is_fast
from rac_modifier.recovery.hidden_states import input_of_head, output_head
from rac_modifier.recovery.loss import head_kl
from rac_modifier.recovery.recomputing import decoder_layers, recomputing
from rac_modifier.recovery.schedule import steps_of_run
from rac_modifier.recovery.trained_parameters import frozen_parameters
from rac_modifier.rehearsal import LiveBytes, without_data
from rac_modifier.settings.recovery import RecoverySettings

_FLOAT32, _MOMENTS, _MASK, _BEST, _CODE, _MASTERS = 4, 8, 1, 4, 9, 8
_STATE = _FLOAT32 + _MOMENTS  # written to the disk
_MARGIN = 0.9  # of the free memory
_GIB = 2**30


class Batch(NamedTuple):
    """A batch to train on: its sequences, their padded length, and the completion tokens that the loss is taken on.

    `follows` says whether it is not the first of its step: the gradients of the first live meanwhile.
    """

    rows: int
    length: int
    predicted: int
    follows: bool = True


@dataclass(frozen=True)
class RecoveryNeed:
    """Bytes that training takes next to the model as it is loaded.

    Attributes:
        device: of each process, on the device that it trains on.
        host: on the CPU, of all processes together, next to these.
        batch: the one whose step takes the most.
        step: peak of its activations and gradients, part of `device`; None where the model does not run without data.
    """

    device: int
    host: int
    batch: Batch
    step: int | None


def check_recovery_memory(
    model: Any,
    settings: RecoverySettings,
    processes: Processes = ALONE,
    *,
    training: Sequence[TokenSequence] | None = None,
    quantizes: bool = False,
) -> RecoveryNeed:
    """Refuse to start where training does not fit; all `processes` are taken to be on this machine.

    Args:
        model: the dense model.
        settings: of recovery.
        processes: that train together.
        training: the traces to train on; None before they are known.
        quantizes: whether weights are trained through codes.

    Raises:
        RacError: with the bytes needed and free, and what to change.
    """
    device = processes.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if training is None:
        tokens = min(settings.batch_tokens, 2 * settings.step_tokens)
        batches = [Batch(1, tokens, tokens - 1)]
    else:
        batches = largest_batches(training, settings, device, processes.count)
    need = recovery_need(
        model, settings, batches, device, processes=processes.count, quantizes=quantizes
    )
    on_cpu = need.host
    if device.type == "cuda":
        _check(need.device, torch.cuda.mem_get_info(device)[0], "the GPU", settings, need)
    else:
        on_cpu += processes.count * need.device
    _check(on_cpu, psutil.virtual_memory().available, "the CPU", settings, need)
    return need


def largest_batches(
    training: Sequence[TokenSequence],
    settings: RecoverySettings,
    device: torch.device,
    processes: int,
) -> list[Batch]:
    """Return the largest batch that begins a step, and the largest that follows one, of the batches that will be trained on."""
    largest: dict[bool, Batch] = {}
    for step in steps_of_run(training, settings, device, processes):
        for number, sequences in enumerate(step.batches):
            length = max(len(ids) for ids, _ in sequences)
            predicted = sum(len(ids) - prompt for ids, prompt in sequences)
            batch = Batch(len(sequences), length, predicted, number > 0)
            before = largest.get(batch.follows)
            if before is None or batch.rows * batch.length > before.rows * before.length:
                largest[batch.follows] = batch
    return sorted(largest.values(), key=lambda batch: -batch.rows * batch.length)


def recovery_need(
    model: Any,
    settings: RecoverySettings,
    batches: Sequence[Batch],
    device: torch.device,
    *,
    processes: int = 1,
    quantizes: bool = False,
) -> RecoveryNeed:
    """Return what training this model on `device` takes; each of several processes trains on a part of a batch's sequences."""
    frozen, parameters = frozen_parameters(model), list(model.parameters())
    trained = [p for p in parameters if p.is_floating_point() and id(p) not in frozen]
    count = sum(p.numel() for p in trained)
    recomputes = settings.activation_checkpointing
    steps = {batch: _step_or_none(model, batch, device, recomputes, processes) for batch in batches}
    batch = max(steps, key=lambda b: steps[b] or b.rows * b.length)
    step = steps[batch]
    on_cpu = device.type == "cpu"

    # Weights, moments and masks, and what a step takes.
    on_device, host = (_FLOAT32 + _MOMENTS + _MASK) * count, _BEST * count
    if processes == 1:
        on_device += _FLOAT32 * count if step is None else step
        on_device -= sum(p.nbytes for p in trained) if on_cpu else 0  # as they were loaded
    else:
        layers = decoder_layers(model, "torchrun")
        layer = max(sum(p.numel() for p in layer.parameters()) for layer in layers)
        gathered = (on_device + _FLOAT32 * count) // processes
        on_device = gathered + 3 * _FLOAT32 * layer + (step or 0)
        # Each process loads the model and has it once more while it is spread; the first gathers the state.
        host += (2 * _FLOAT32 * processes + _BEST + (_STATE if on_cpu else 0)) * count
    if quantizes:
        coded = sum(p.numel() for p in trained if p.dim() == 2)
        on_device += coded * (_MASTERS + (0 if recomputes else _CODE))
    if on_cpu:
        on_device += int((HEAP_GAPS - 1) * (step or 0))
    else:
        on_device += sum(p.nbytes for p in parameters if id(p) in frozen)
        host += _STATE * count
    return RecoveryNeed(on_device, host, batch, step)


def step_bytes(
    model: Any,
    batch: Batch,
    *,
    autocast: torch.dtype | None,
    recomputes: bool,
    keeps_gradients: bool = True,
) -> int:
    """Rehearse a training step and return the bytes that it takes at its peak next to weights and moments.

    Operators are those of the CPU; others keep about as much. From fake tensors transformers cannot tell that attention needs
    no mask, and makes one: about 8 bytes x length^2 are counted that a run does not take.

    Args:
        model: a causal LM; it is not changed.
        batch: where it follows another one, the step has two.
        autocast: dtype of matmuls.
        recomputes: whether activations of layers are computed again.
        keeps_gradients: False: a gradient is freed as soon as its parameter has it.

    Raises:
        RuntimeError: of torch: a shape depends on data, as those of routed experts.
    """
    with without_data(model) as student:
        frozen = frozen_parameters(student)
        for weight in student.parameters():
            weight.requires_grad_(weight.is_floating_point() and id(weight) not in frozen)
            if weight.requires_grad:
                weight.data = weight.data.float()
                if not keeps_gradients:
                    weight.register_post_accumulate_grad_hook(_drop_gradient)
        ids = torch.zeros(batch.rows, batch.length - 1, dtype=torch.long)
        head: Any = output_head(student)
        states = head.weight.new_empty(batch.predicted, head.weight.shape[1])
        with LiveBytes() as live, recomputing(student, recomputes):
            for _ in range(2 if batch.follows else 1):
                with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
                    hidden = input_of_head(student, ids).flatten(0, 1)[: batch.predicted].clone()
                head_kl(hidden, states, head).backward()
                del hidden
    return live.peak


def _drop_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None


def _step_or_none(
    model: Any, batch: Batch, device: torch.device, recomputes: bool, processes: int
) -> int | None:
    """Return `step_bytes` of a process's part of the batch; None, and a warning, where the model does not run without data."""
    rows = -(-batch.rows // processes)
    part = Batch(rows, batch.length, batch.predicted * rows // batch.rows, batch.follows)
    try:
        return step_bytes(
            model,
            part,
            autocast=torch.bfloat16 if bf16_is_fast(device) else None,
            recomputes=recomputes,
            keeps_gradients=processes == 1,
        )
    except RuntimeError as error:
        logger.warning(
            f"recovery: activations of {type(model).__name__} are not counted in the memory that is needed, since it does not "
            f"run without data ({error})"
        )
        return None


def _check(
    need: int, free: int, where: str, settings: RecoverySettings, counted: RecoveryNeed
) -> None:
    step, batch = counted.step, counted.batch
    of_step = "activations are not counted"
    if step is not None:
        of_step = (
            f"{step / _GIB:.1f} GiB of it for a step on {batch.rows} x {batch.length:,} tokens"
        )
    message = f"recover: training needs about {need / _GIB:.1f} GiB on {where} next to the model ({of_step})"
    if need <= _MARGIN * free:
        logger.info(f"{message}; {free / _GIB:.1f} GiB are free")
        return
    steps = ["use a machine with more memory", "leave recover out"]
    if step is not None and step > need / 4:
        steps.insert(0, f"set recover.batch_tokens below {batch.rows * batch.length:,}")
        if not settings.activation_checkpointing:
            steps.insert(0, "set recover.activation_checkpointing: true")
    raise RacError(f"{message}, and {free / _GIB:.1f} GiB are free; {', or '.join(steps)}")
