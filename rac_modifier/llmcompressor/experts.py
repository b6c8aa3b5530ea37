"""Find the routed experts of a model, and choose the tokens that calibrate each."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from llmcompressor.modeling.moe.linear_experts import LinearExperts2D
from loguru import logger
from torch import Tensor

from rac_modifier.distributed.processes import Processes
from rac_modifier.errors import RacError
from rac_modifier.runtime.models import input_of


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


_FIRST, _LAST = ("gate_proj", "up_proj"), "down_proj"


@dataclass(frozen=True)
class Expert:
    """Hold the modules of an expert that are pruned."""

    name: str
    number: int
    module: torch.nn.Module
    first: list[torch.nn.Module]  # gate and up, which read the tokens
    last: list[torch.nn.Module]  # down, which reads what the activation makes of these

    @property
    def groups(self) -> list[list[torch.nn.Module]]:
        """Return the modules that read the same input, in pruning order."""
        return [group for group in (self.first, self.last) if group]

    def input_of_down(self, x: Tensor) -> Tensor:
        """Return what down reads [tokens, width] for tokens `x` [tokens, hidden]."""
        inputs = input_of(getattr(self.module, _LAST), lambda: self.module(x))
        assert inputs is not None
        return inputs


@dataclass(frozen=True)
class RoutedExperts:
    """Hold the experts of a layer; it is called with all tokens and their routes."""

    name: str
    module: LinearExperts2D
    experts: list[Expert]  # those with modules that are pruned
    router: torch.nn.Module  # its weight [experts, hidden] gives the logits

    @property
    def modules(self) -> list[torch.nn.Module]:
        """Return all modules that are pruned."""
        return [module for expert in self.experts for group in expert.groups for module in group]


def check_experts(model: torch.nn.Module) -> None:
    """Refuse experts with biases, whose saved names no loader of transformers knows (RacError)."""
    for name, module in model.named_modules():
        if isinstance(module, LinearExperts2D) and module.has_bias:
            raise RacError(
                f"{name}: experts with biases, as gpt-oss has them, are saved under names that "
                "transformers cannot load; quantize this model with llm-compressor alone"
            )


def find_experts(
    model: torch.nn.Module, names: Mapping[torch.nn.Module, str]
) -> list[RoutedExperts]:
    """Return the layers of routed experts, of known form, that have modules among `names`."""
    layers = []
    for name, module in model.named_modules():
        if getattr(type(module), "forward", None) is not LinearExperts2D.forward:
            continue
        experts = []
        for number in range(module.num_experts):
            children = module[number].named_modules()
            linears: dict[str, torch.nn.Module] = {
                child: m for child, m in children if isinstance(m, torch.nn.Linear)
            }
            if not linears.keys() <= {*_FIRST, _LAST} or _LAST not in linears:
                break
            first = [m for child, m in linears.items() if child != _LAST and m in names]
            last = [linears[_LAST]] if linears[_LAST] in names else []
            experts.append(Expert(f"{name}.{number}", number, module[number], first, last))
        else:
            targeted, router = [e for e in experts if e.groups], _router(model, name, module)
            if targeted and router is not None:
                layers.append(RoutedExperts(name, module, targeted, router))
    return layers


def _router(model: torch.nn.Module, name: str, experts: LinearExperts2D) -> torch.nn.Module | None:
    """Return the module next to the experts, or inside of such a one, with a row per expert."""
    siblings = model.get_submodule(name.rpartition(".")[0]).children()
    for module in (m for sibling in siblings if sibling is not experts for m in sibling.modules()):
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim != 2:
            continue
        if weight.shape[0] == experts.num_experts:
            return module
    return None


def report_tokens(layer: str, tokens: Mapping[str, ExpertTokens], floor: int) -> dict[str, Any]:
    """Log the tokens that calibrate the experts of a layer, by name; return the record's entry."""
    routed = [counts.routed for counts in tokens.values()]
    least, median, most = min(routed), statistics.median(routed), max(routed)
    logger.info(f"{layer}: {least:,} to {most:,} tokens per expert, median {median:,}")
    starved = {expert: asdict(counts) for expert, counts in tokens.items() if counts.added}
    if starved:
        logger.warning(
            f"{layer}: fewer than expert_floor ({floor:,}) tokens are routed to {len(starved)} "
            "experts; the nearest ones were added; raise calibration.tokens for more of their own"
        )
    of_layer = {"least": least, "median": median, "most": most}
    return {"experts": len(tokens), "routed": of_layer, "starved": starved}
