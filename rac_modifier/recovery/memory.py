"""Forecast the memory of recovery, and refuse a run that does not fit.

A step is rehearsed (runtime/models.py), and bytes per trained weight are counted. Each of several
processes loads the model, copies it, trains a part of the weights, and holds three whole layers.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import psutil
import torch
from loguru import logger

from rac_modifier.distributed.processes import ALONE, Processes
from rac_modifier.errors import RacError
from rac_modifier.measure.teacher_forcing import TokenSequence, input_of_head
from rac_modifier.pruning.linalg import bf16_is_fast
from rac_modifier.recovery.loss import head_kl, output_head
from rac_modifier.recovery.student import decoder_layers, frozen_parameters, recomputing
from rac_modifier.recovery.training_loop import plan_steps
from rac_modifier.runtime.cpu_tuning import HEAP_GAPS
from rac_modifier.runtime.models import LiveBytes, free_bytes, without_data
from rac_modifier.settings.recovery import RecoverySettings

# Bytes per trained weight. The state is the weight and AdamW's moments, of a GPU copied to the CPU
# to be written. Of a weight with codes there are two masters, and a float32 matmul keeps its value.
_FLOAT32, _STATE, _MASK, _BEST, _VALUE, _MASTERS = 4, 12, 1, 4, 4, 8
_MARGIN = 0.9  # of the free memory
_GIB = 2**30


class Batch(NamedTuple):
    """A batch to train on: sequences, padded length, completion tokens in the loss."""

    rows: int
    length: int
    predicted: int


class RecoveryNeed(NamedTuple):
    """Bytes that training takes next to the model as it is loaded."""

    device: int  # of each process, on the device that it trains on
    host: int  # on the CPU, of all processes together, next to these
    step: int | None  # peak of a step, part of `device`; None: unknown


def check_recovery_memory(
    model: Any,
    settings: RecoverySettings,
    processes: Processes = ALONE,
    *,
    training: Sequence[TokenSequence] | None = None,
    quantizes: bool = False,
) -> RecoveryNeed:
    """Refuse training of the dense `model` that does not fit on this machine (RacError)."""
    device = processes.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    count, on_gpu = processes.count, device.type == "cuda"
    tokens = min(settings.batch_tokens, 2 * settings.step_tokens)
    batch = Batch(1, tokens, tokens - 1)
    if training is not None:
        batch = largest_batch(training, settings, device, count)
    need = recovery_need(model, settings, batch, device, processes=count, quantizes=quantizes)
    host = need.host * processes.local // count
    on_cpu = host + (0 if on_gpu else processes.local * need.device)
    places = [("the CPU", on_cpu, psutil.virtual_memory().available)]
    if on_gpu and (unused := free_bytes(device)) is not None:
        places.append(("the GPU", need.device, unused))
    for where, needed, free in places:
        message = (
            f"recover: training needs about {needed / _GIB:.1f} GiB on {where} next to the model "
            f"({(need.step or 0) / _GIB:.1f} GiB of it for a step on {batch.rows} x "
            f"{batch.length:,} tokens), and {free / _GIB:.1f} GiB are free"
        )
        if needed > _MARGIN * free:
            raise RacError(
                f"{message}; set recover.activation_checkpointing: true, lower "
                "recover.batch_tokens, use a machine with more memory, or leave recover out"
            )
        logger.info(message)
    return need


def largest_batch(
    training: Sequence[TokenSequence],
    settings: RecoverySettings,
    device: torch.device,
    processes: int,
) -> Batch:
    """Return the largest batch of the steps."""
    steps = plan_steps(training, settings, device, processes)
    batches = (batch for step in steps for batch in step.batches)
    largest = max(batches, key=lambda batch: len(batch) * max(len(ids) for ids, _ in batch))
    predicted = sum(len(ids) - prompt for ids, prompt in largest)
    return Batch(len(largest), max(len(ids) for ids, _ in largest), predicted)


def recovery_need(
    model: Any,
    settings: RecoverySettings,
    batch: Batch,
    device: torch.device,
    *,
    processes: int = 1,
    quantizes: bool = False,
) -> RecoveryNeed:
    """Return what training on `device` takes; each process has a part of a batch's sequences."""
    frozen, parameters = frozen_parameters(model), list(model.parameters())
    trained = [p for p in parameters if p.is_floating_point() and id(p) not in frozen]
    count, on_cpu, alone = sum(p.numel() for p in trained), device.type == "cpu", processes == 1
    rows, step = -(-batch.rows // processes), None
    part = batch._replace(rows=rows, predicted=batch.predicted * rows // batch.rows)
    recomputes, bf16 = settings.activation_checkpointing, bf16_is_fast(device)
    try:
        step = step_bytes(model, part, recomputes, bf16=bf16, frees=not alone)
    except RuntimeError as error:  # of torch: a shape depends on data, as with routed experts
        name = type(model).__name__
        logger.warning(f"recovery: activations of {name} are not counted in its memory ({error})")

    gradients = _FLOAT32 * count if step is None or not alone else 0
    on_device, host = (_STATE + _MASK) * count + gradients, _BEST * count
    if alone:
        on_device -= sum(p.nbytes for p in trained) if on_cpu else 0  # as they were loaded
    else:
        layers = decoder_layers(model, "torchrun")
        layer = max(sum(p.numel() for p in layer.parameters()) for layer in layers)
        on_device = on_device // processes + 3 * _FLOAT32 * layer
        host += (2 * _FLOAT32 * processes + _BEST + (_STATE if on_cpu else 0)) * count
    if quantizes:
        coded = sum(p.numel() for p in trained if p.dim() == 2)
        on_device += coded * (_MASTERS + (0 if recomputes or bf16 else _VALUE))
    on_device += int((step or 0) * (HEAP_GAPS if on_cpu else 1))
    if not on_cpu:
        on_device += sum(p.nbytes for p in parameters if id(p) in frozen)
        host += _STATE * count
    return RecoveryNeed(on_device, host, step)


def step_bytes(model: Any, batch: Batch, recomputes: bool, *, bf16: bool, frees: bool) -> int:
    """Rehearse a step of two batches; return its peak bytes next to weights and moments."""
    with without_data(model) as student:
        frozen = frozen_parameters(student)
        for weight in student.parameters():
            weight.requires_grad_(weight.is_floating_point() and id(weight) not in frozen)
            if weight.requires_grad:
                weight.data = weight.data.float()
                if frees:
                    weight.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        ids = torch.zeros(batch.rows, batch.length - 1, dtype=torch.long)
        head: Any = output_head(student)
        states = head.weight.new_empty(batch.predicted, head.weight.shape[1])
        with LiveBytes() as live, recomputing(student, recomputes):
            for _ in range(2):
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
                    hidden = input_of_head(student, ids).flatten(0, 1)[: batch.predicted].clone()
                head_kl(hidden, states, head).backward()
                del hidden
    return live.peak
