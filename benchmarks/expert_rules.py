"""Rules for the tokens that an expert of a mixture is calibrated on, which expert_tokens.py compares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rac_modifier.processes import Processes
from rac_modifier.pruning.routed_tokens import filled_up, routed_rows

EXPERTS, CHOSEN = 16, 2


@dataclass(frozen=True)
class Tokens:
    """What the experts of a layer are given: inputs [tokens, d], chosen experts [tokens, k], their shares, all probabilities."""

    x: Tensor
    chosen: Tensor
    shares: Tensor
    probabilities: Tensor

    def routed(self, expert: int) -> Tensor:
        """Bool per token."""
        return (self.chosen == expert).any(1)

    def share(self, expert: int) -> Tensor:
        """The share of an expert in each token's output; 0 where it is not routed to it."""
        return torch.where(self.chosen == expert, self.shares, 0.0).sum(1)


Rule = Callable[[Tokens, int], Tensor]  # the weight of each token for one expert


def everything(tokens: Tokens, expert: int) -> Tensor:
    return torch.ones(len(tokens.x))


def evenly(floor: int) -> Rule:
    """Filled up with tokens that are evenly spread, as the package does where it does not know the router."""

    def rule(tokens: Tokens, expert: int) -> Tensor:
        counted = torch.ones(len(tokens.x), dtype=torch.bool)
        rows = routed_rows(tokens.chosen, counted, EXPERTS)[expert]
        return _ones_at(filled_up([rows], [counted], floor, Processes())[0][0], len(counted))

    return rule


def nearest(floor: int) -> Rule:
    """What the package does: filled up with the tokens that come closest to being routed to the expert."""

    def rule(tokens: Tokens, expert: int) -> Tensor:
        least = tokens.probabilities.topk(CHOSEN).values[:, -1]
        margin = (tokens.probabilities[:, expert] / least).log()  # 0 and more: routed
        own = tokens.routed(expert)
        margin[own] = float("inf")
        return _ones_at(margin.topk(max(floor, int(own.sum()))).indices, len(margin))

    return rule


def shrunk(floor: int) -> Rule:
    """All other tokens, weighted down so that together they weigh what is missing."""

    def rule(tokens: Tokens, expert: int) -> Tensor:
        own = tokens.routed(expert)
        missing = max(floor - int(own.sum()), 0)
        return torch.where(own, 1.0, missing / max(len(own) - int(own.sum()), 1))

    return rule


def by_share(floor: int) -> Rule:
    """As `nearest`, but each token weighs the square of the expert's share in its output."""

    def rule(tokens: Tokens, expert: int) -> Tensor:
        would_have = tokens.probabilities[:, expert] / tokens.probabilities.topk(CHOSEN).values.sum(
            1
        )
        return nearest(floor)(tokens, expert) * would_have.square().clamp_min(1e-6)

    return rule


def _ones_at(rows: Tensor, size: int) -> Tensor:
    return torch.zeros(size).index_fill(0, rows, 1.0)


RULES: dict[str, Rule] = {
    "all tokens": everything,
    "routed only": evenly(1),
    **{f"floor {floor}, others evenly": evenly(floor) for floor in (128, 512, 2048)},
    **{f"floor {floor}, the nearest": nearest(floor) for floor in (128, 512, 2048)},
    "floor 512, all others weighted down": shrunk(512),
    "floor 512, weighted by share squared": by_share(512),
}
