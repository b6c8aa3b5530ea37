"""Which tokens calibrate a routed expert: its own and, below a floor, others as well."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rac_modifier.distributed.processes import Processes


def routed_rows(chosen: Tensor, counted: Tensor, experts: int) -> list[Tensor]:
    """Return for each expert the numbers of the tokens that are routed to it, ascending.

    `chosen` [tokens, k] has the numbers of each token's experts, beyond the experts where it is
    dropped; `counted` [tokens] is False for padding.
    """
    # a stable sort by expert keeps the tokens of each in ascending order
    numbers = chosen.masked_fill(~counted.unsqueeze(1), experts).flatten()
    order = numbers.sort(stable=True).indices // chosen.shape[1]
    counts: list[int] = numbers.bincount(minlength=experts).tolist()
    return list(order.split(counts)[:experts])


@dataclass(frozen=True)
class ExpertTokens:
    """Tokens that calibrate an expert: `routed` to it, and `added` by nearness."""

    routed: int
    added: int


Rows = Sequence[Tensor]  # a tensor per batch


def filled_up(
    rows: Rows,
    counted: Rows,
    floor: int,
    processes: Processes,
    nearness: Callable[[], Rows],
    numbers: Sequence[int],
) -> tuple[list[Tensor], ExpertTokens]:
    """Fill up the `rows` that are routed to an expert in each batch to `floor` tokens.

    Add `counted` tokens that are routed elsewhere, with the highest `nearness`, a number per token.
    Several processes share the batches; `numbers` are the places of this one's among all.
    """
    routed = int(processes.sums(sum(map(len, rows)))[0])
    missing = max(floor - routed, 0)
    if not missing:
        return list(rows), ExpertTokens(routed, 0)
    free = [
        real.index_fill(0, places, False).nonzero().flatten()
        for places, real in zip(rows, counted, strict=True)
    ]
    near = [values[places] for values, places in zip(nearness(), free, strict=True)]
    picked = _nearest(near, missing, numbers, processes)
    filled = [
        torch.cat([before, places[torch.tensor(chosen, device=places.device, dtype=torch.long)]])
        for before, places, chosen in zip(rows, free, picked, strict=True)
    ]
    added = int(processes.sums(sum(map(len, picked)))[0])
    return [x.sort().values for x in filled], ExpertTokens(routed, added)


def _nearest(
    near: Rows, missing: int, numbers: Sequence[int], processes: Processes
) -> list[list[int]]:
    """Pick the places of the highest values of each batch; ties by batch and place."""
    sizes, values = torch.tensor([len(x) for x in near]), torch.cat(list(near))
    # the nearest `missing` of all ranks are among the nearest `missing` of each
    best = values.sort(descending=True, stable=True).indices[:missing]
    keys, best = (-values[best]).tolist(), best.cpu()
    batches = torch.arange(len(near)).repeat_interleave(sizes)[best]
    places = (best - (sizes.cumsum(0) - sizes)[batches]).tolist()
    owners = [numbers[batch] for batch in batches.tolist()]
    candidates = [list(entry) for entry in zip(keys, owners, places, strict=True)]
    everywhere = sorted(x for rank in processes.from_all(candidates) for x in rank)[:missing]
    picked: dict[int, list[int]] = {number: [] for number in numbers}
    for _, number, place in everywhere:
        if number in picked:
            picked[number].append(place)
    return [picked[number] for number in numbers]
