"""Which tokens a routed expert is calibrated on: those that the router sends to it and, below a floor, others as well."""

from __future__ import annotations

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
    rows: Rows, counted: Rows, floor: int, processes: Processes, nearness: Callable[[], Rows] | None = None
) -> tuple[list[torch.Tensor], ExpertTokens]:
    """The `rows` that are routed to an expert in each batch, filled up to `floor` tokens.

    Added are `counted` tokens that are routed elsewhere: those of the highest `nearness`, a number per token, or without it
    tokens that are evenly spread. Each of several processes has some of the batches, and adds its part.
    """
    routed = int(processes.sums(sum(map(len, rows)))[0])
    missing = max(floor - routed, 0)
    if not missing:
        return list(rows), ExpertTokens(routed, 0)
    mine = missing * (processes.rank + 1) // processes.count - missing * processes.rank // processes.count
    others = [real.index_fill(0, taken, False) for taken, real in zip(rows, counted, strict=True)]
    places = torch.cat(others).nonzero().flatten()
    mine = min(mine, len(places))
    if nearness is None:
        picked = torch.arange(mine, device=places.device) * len(places) // max(mine, 1)
    else:
        picked = torch.cat(list(nearness()))[places].sort(descending=True, stable=True).indices[:mine]
    added = torch.zeros(sum(map(len, counted)), dtype=torch.bool, device=places.device)
    added[places[picked]] = True
    filled = [
        torch.cat([taken, more.nonzero().flatten()]).sort().values
        for taken, more in zip(rows, added.split([len(real) for real in counted]), strict=True)
    ]
    return filled, ExpertTokens(routed, int(processes.sums(mine)[0]), nearness is None)


def all_rows(rows: Rows, counted: Rows, processes: Processes) -> tuple[list[torch.Tensor], ExpertTokens]:
    """All tokens that are `counted`, whether they are routed to the expert (`rows`) or not."""
    routed, every = processes.sums(sum(map(len, rows)), sum(int(real.sum()) for real in counted))
    return [real.nonzero().flatten() for real in counted], ExpertTokens(int(routed), int(every - routed))
