"""A run that cannot fit into memory ends before it starts; one that fits only if activations are computed twice does that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from loguru import logger

from rac_modifier.errors import RacError
from rac_modifier.freed_memory import expect_growth
from rac_modifier.llmcompressor.group_shape import GroupShape
from rac_modifier.llmcompressor.memory import FLOAT32, MemoryNeed
from rac_modifier.model_tools import free_bytes
from rac_modifier.pruning.hessian import ROWS


def check_memory(
    need: MemoryNeed,
    groups: Sequence[GroupShape],
    onload: torch.device,
    offload: torch.device,
    free: Callable[[torch.device], int | None] | None = None,
    *,
    processes: int = 1,
) -> MemoryNeed:
    """Refuse a run whose largest group needs more memory than is free; say how much that is.

    Statistics and solver use `onload`, activations are kept on `offload`; where both are one device, both count there.
    Of several processes on one machine, each has a device of its own, and an equal part of the memory of the host.

    Returns:
        what the run needs; with `twice_before` where it fits only so.

    Raises:
        RacError: naming the module, the bytes needed and free, and what to change.
    """
    free = free or free_bytes
    need = _fitting(need, groups, onload, offload, free, processes)
    expect_growth(
        max(need.bytes_on(torch.device("cpu"), onload, offload, group) for group in groups)
    )
    doing = "quantizing" if need.solver.solver == "none" else "pruning"
    for device in dict.fromkeys((onload, offload)):
        bytes_of = partial(need.bytes_on, device, onload, offload)
        largest = max(groups, key=bytes_of)
        needed, available = bytes_of(largest), free(device)
        if available is not None and device.type == "cpu":
            available //= processes
        message = f"{doing} {largest.name} is predicted to need {_gib(needed)} on {device} beside the model"
        if available is None:
            logger.info(f"{message}; how much is free there is not known, so it is not checked")
        elif needed > available:
            raise RacError(
                f"{message}, and {_gib(available)} are free: {_next_step(need, largest, bytes_of(largest))}"
            )
        else:
            logger.info(f"{message}; {_gib(available)} are free")
    return need


def _fitting(
    need: MemoryNeed,
    groups: Sequence[GroupShape],
    onload: torch.device,
    offload: torch.device,
    free: Callable[[torch.device], int | None],
    processes: int,
) -> MemoryNeed:
    """The same run; where its activations do not fit, what is before the widest groups runs twice, if less is kept then."""
    available = free(offload)
    if available is not None and offload.type == "cpu":
        available //= processes
    widest = max((group.columns for group in groups if not group.routed), default=0)
    twice = replace(need, twice_before=widest)
    needs = [
        max(one.bytes_on(offload, onload, offload, group) for group in groups)
        for one in (need, twice)
    ]
    if available is None or needs[0] <= available or needs[1] >= needs[0]:
        return need
    if needs[1] <= available:
        logger.info(
            f"the inputs of the widest modules are computed twice in place of kept, since {_gib(available)} are free on "
            f"{offload}: that takes {_gib(needs[0] - needs[1])} less and some more time, and the result is the same"
        )
    return twice


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB ({count:,} bytes)"


def _next_step(need: MemoryNeed, group: GroupShape, needed: int) -> str:
    """What would help most: fewer activations, smaller batches, or a lighter method."""
    steps = []
    if need.kept(group) > needed / 4:
        steps.append(
            f"set a lower calibration.tokens ({need.tokens:,} tokens are calibrated on now)"
        )
    if min(need.batch_tokens, ROWS) * group.columns * FLOAT32 > needed / 8:
        below = min(need.batch_tokens, ROWS)  # of a larger batch no more are converted at once
        steps.append(
            f"set calibration.batch_tokens below {below:,} (the largest batch has {need.batch_tokens:,})"
        )
    if need.dense_target:
        steps.append("set reconstruct: pruned, which keeps one model's activations instead of two")
    if not need.by_layer:
        steps.append("set preset: paper, which keeps activations between layers only")
    steps.append(f"add {group.name} to ignore")
    return ", or ".join(steps)
