"""Which tokens a routed expert is calibrated on: those that the router sends to it and, below a floor, others as well."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from rac_modifier.processes import Processes


def routed_rows(chosen: torch.Tensor, counted: torch.Tensor, experts: int) -> list[torch.Tensor]:
    """For each expert the numbers of the tokens that are routed to it, ascending.

    `chosen` [tokens, k] has the numbers of each token's experts, bool `counted` [tokens] is False for padding.
    """
    chosen = chosen.masked_fill(~counted.unsqueeze(1), experts).flatten()
    order = chosen.sort(stable=True).indices // (chosen.numel() // max(counted.numel(), 1) or 1)
    counts: list[int] = chosen.bincount(minlength=experts + 1).tolist()
    return list(order.split(counts)[:experts])


@dataclass(frozen=True)
class ExpertTokens:
    """How many tokens an expert is calibrated on: `routed` to it, and `added` ones, `evenly` spread or nearest to it; in all."""

    routed: int
    added: int
    evenly: bool = False


Rows = Sequence[torch.Tensor]  # a tensor per batch


def filled_up(
    rows: Rows,
    counted: Rows,
    floor: int,
    processes: Processes,
    nearness: Callable[[], Rows] | None = None,
    numbers: Sequence[int] | None = None,
) -> tuple[list[torch.Tensor], ExpertTokens]:
    """The `rows` that are routed to an expert in each batch, filled up to `floor` tokens.

    Added are `counted` tokens that are routed elsewhere: those of the highest `nearness`, a number per token, or without it
    tokens that are evenly spread. Each of several processes has some of the batches, and `numbers` are the places of these
    among all: the tokens that are added are those of one process with all batches.
    """
    routed = int(processes.sums(sum(map(len, rows)))[0])
    missing = max(floor - routed, 0)
    if not missing:
        return list(rows), ExpertTokens(routed, 0)
    others = [
        real.index_fill(0, taken, False).nonzero().flatten()
        for taken, real in zip(rows, counted, strict=True)
    ]
    numbers = range(len(rows)) if numbers is None else numbers
    if nearness is None:
        picked, added = _evenly(others, missing, numbers, processes)
    else:
        near = [values[places] for values, places in zip(nearness(), others, strict=True)]
        picked, added = _nearest(near, missing, numbers, processes)
    filled = [
        torch.cat([taken, places[torch.tensor(chosen, device=places.device, dtype=torch.long)]])
        .sort()
        .values
        for taken, places, chosen in zip(rows, others, picked, strict=True)
    ]
    return filled, ExpertTokens(routed, added, nearness is None)


def _evenly(
    others: Rows, missing: int, numbers: Sequence[int], processes: Processes
) -> tuple[list[list[int]], int]:
    """Evenly spread ones of the `others` of each batch, by their places in it; and how many there are in all processes."""
    own = [(number, len(places)) for number, places in zip(numbers, others, strict=True)]
    sizes = sorted(tuple(pair) for part in processes.from_all(own) for pair in part)
    before, total = {}, 0
    for number, size in sizes:
        before[number], total = total, total + size
    added = min(missing, total)
    spread = [i * total // added for i in range(added)]
    picked = []
    for number, places in zip(numbers, others, strict=True):
        first, last = (bisect_left(spread, before[number] + end) for end in (0, len(places)))
        picked.append([place - before[number] for place in spread[first:last]])
    return picked, added


def _nearest(
    near: Rows, missing: int, numbers: Sequence[int], processes: Processes
) -> tuple[list[list[int]], int]:
    """The highest values of each batch, by their places in it; and how many there are in all processes. Ties by place."""
    values = torch.cat(list(near))
    best = values.sort(descending=True, stable=True).indices[:missing].cpu()
    batch = torch.arange(len(near)).repeat_interleave(torch.tensor([len(part) for part in near]))[
        best
    ]
    places = torch.cat([torch.arange(len(part)) for part in near])[best]
    own = list(
        zip(
            values[best].tolist(),
            (numbers[i] for i in batch.tolist()),
            places.tolist(),
            strict=True,
        )
    )
    candidates = [tuple(one) for part in processes.from_all(own) for one in part]
    if processes.count > 1:
        candidates = sorted(candidates, key=lambda one: (-one[0], *one[1:]))[:missing]
    picked: dict[int, list[int]] = {number: [] for number in numbers}
    for _, number, place in candidates:
        if number in picked:
            picked[number].append(place)
    return [picked[number] for number in numbers], len(candidates)


def all_rows(
    rows: Rows, counted: Rows, processes: Processes
) -> tuple[list[torch.Tensor], ExpertTokens]:
    """All tokens that are `counted`, whether they are routed to the expert (`rows`) or not."""
    routed, every = processes.sums(sum(map(len, rows)), sum(int(real.sum()) for real in counted))
    return [real.nonzero().flatten() for real in counted], ExpertTokens(
        int(routed), int(every - routed)
    )
