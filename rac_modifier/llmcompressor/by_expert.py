"""Prune the routed experts of a layer, each on its own tokens: gate and up, then down on what the pruned gate and up give it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from compressed_tensors.utils import align_module_device
from llmcompressor.pipelines.cache import IntermediatesCache

from rac_modifier.calibration.loader import CalibrationLoader
from rac_modifier.llmcompressor.experts import Expert, RoutedExperts
from rac_modifier.llmcompressor.input_groups import InputGroup
from rac_modifier.llmcompressor.pruner import Pruner
from rac_modifier.llmcompressor.solving import at_once
from rac_modifier.llmcompressor.stages import Stage
from rac_modifier.pruning.routed_tokens import ExpertTokens, all_rows, filled_up, routed_rows


@dataclass(frozen=True)
class Batch:
    """What the router is given in one batch, tokens in rows, where the cache keeps it.

    Attributes:
        x: [tokens, hidden] in the pruned model.
        dense: the same in the dense model, None where it is not needed.
        chosen: [tokens, k], the numbers of each token's experts in the pruned model.
        weights: [tokens], those of the calibration set.
        number: the batch's place in the calibration set of all processes.
        lanes_ended: so many lanes end with it.
    """

    x: torch.Tensor
    dense: torch.Tensor | None
    chosen: torch.Tensor
    weights: torch.Tensor
    number: int
    lanes_ended: int


def read_by_experts(
    stage: Stage,
    pruned: IntermediatesCache,
    dense: IntermediatesCache | None,
    loader: CalibrationLoader,
) -> list[Batch]:
    """What the experts of a stage read. It stays there when the stage has run and the caches have dropped it."""

    def kept(cache: IntermediatesCache, number: int, name: str | None) -> torch.Tensor:
        value: torch.Tensor = cache.batch_intermediates[number][str(name)].value  # type: ignore[assignment]
        return value.reshape(-1, value.shape[-1])

    return [
        Batch(
            kept(pruned, number, stage.reads),
            None if dense is None else kept(dense, number, stage.reads),
            kept(pruned, number, stage.chosen),
            weights.reshape(-1),
            loader.numbers[number],
            loader.lanes_ended[number],
        )
        for number, weights in enumerate(loader.token_weights)
    ]


def prune_experts(
    routed: RoutedExperts, batches: Sequence[Batch], pruner: Pruner, device: torch.device
) -> None:
    """Prune the experts of a layer; several processes solve as many experts at a time, each several where they are small.

    Each expert is calibrated on the tokens that the router sends to it in the pruned model, as in use later, and up to
    `expert_floor` on those that it all but sends there; or on all tokens, if `experts` says so. The dense model's inputs are
    those of the same tokens.
    """
    processes = pruner.processes
    counted = [(batch.weights > 0).to(batch.chosen.device) for batch in batches]
    by_expert = [
        routed_rows(batch.chosen, real, routed.module.num_experts)
        for batch, real in zip(batches, counted, strict=True)
    ]
    near = None if routed.router is None else _Nearness(routed.router, batches, device)
    tokens: dict[str, ExpertTokens] = {}
    together = min(
        at_once(group, device, pruner.gains_at_once) for group in routed.experts[0].groups
    )
    numbers, step = [batch.number for batch in batches], processes.count * together
    for start in range(0, len(routed.experts), step):
        some = []
        for expert in routed.experts[start : start + step]:
            own = [rows[expert.number] for rows in by_expert]
            if pruner.experts == "all":
                rows, counts = all_rows(own, counted, processes)
            else:
                nearness = None if near is None else partial(near.of, expert.number)
                rows, counts = filled_up(
                    own, counted, pruner.expert_floor, processes, nearness, numbers
                )
            tokens[expert.name] = counts
            some.append(_Inputs.of(expert, rows, batches, pruner, device))
        _prune(
            [(inputs.expert.first, inputs.tokens()) for inputs in some], pruner, device, together
        )
        _prune(
            [(inputs.expert.last, inputs.activated()) for inputs in some], pruner, device, together
        )
    pruner.record_experts(routed.name, tokens)


class _Nearness:
    """How near tokens are to being routed to an expert: its logit, less the least logit of those that are chosen."""

    def __init__(self, router: torch.nn.Module, batches: Sequence[Batch], device: torch.device):
        self._batches, self._device = batches, device
        with align_module_device(router):
            weight: torch.Tensor = router.weight  # type: ignore[assignment]
            self._weight = weight.detach().to(device, torch.float32)
        self._least: list[torch.Tensor] | None = None

    def of(self, number: int) -> list[torch.Tensor]:
        """For one expert, a number per token of each batch."""
        if self._least is None:
            k = self._batches[0].chosen.shape[1]
            self._least = [logits.topk(k).values[:, -1] for logits in self._logits(self._weight)]
        found = self._logits(self._weight[number : number + 1])
        return [
            (logits[:, 0] - least).to(batch.chosen.device)
            for logits, least, batch in zip(found, self._least, self._batches, strict=True)
        ]

    def _logits(self, weight: torch.Tensor) -> Iterator[torch.Tensor]:
        return (batch.x.to(self._device).float() @ weight.T for batch in self._batches)


# inputs, token weights, inputs in the dense model; None without tokens. And how many lanes end with the batch
_Rows = tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None, int]


def _prune(
    parts: Iterable[tuple[list[torch.nn.Module], Iterable[_Rows]]],
    pruner: Pruner,
    device: torch.device,
    together: int,
) -> None:
    groups = []
    for modules, inputs in parts:
        if pruner.was_pruned(modules):  # by a run that was killed
            pruner.restore(modules)
        elif modules:
            groups.append(
                InputGroup.of(modules, device, with_cross_moment=pruner.needs_dense_stream)
            )
            for rows, lanes_ended in inputs:
                if rows is not None:
                    groups[-1].statistics.add(*rows)
                groups[-1].statistics.end_lanes(lanes_ended, pruner.processes)
            groups[-1].statistics.finish(pruner.processes)  # before the next takes memory
    if groups:
        pruner.prune_groups(groups, together)


@dataclass(frozen=True)
class _Inputs:
    """What one expert reads: the rows of each batch, and what its down reads of them in the dense model."""

    expert: Expert
    parts: Sequence[tuple[torch.Tensor, Batch]]
    device: torch.device
    dense: Sequence[torch.Tensor | None]

    @classmethod
    def of(
        cls,
        expert: Expert,
        rows: Sequence[torch.Tensor],
        batches: Sequence[Batch],
        pruner: Pruner,
        device: torch.device,
    ) -> _Inputs:
        """To be called while the expert is dense: what its down then reads is computed here."""
        parts = list(zip(rows, batches, strict=True))
        dense: list[torch.Tensor | None] = [None] * len(parts)
        if expert.last and not pruner.was_pruned(expert.last):
            for i, (taken, batch) in enumerate(parts):
                if batch.dense is not None and len(taken):
                    dense[i] = expert.read_by_last(batch.dense[taken].to(device)).to(
                        batch.dense.device
                    )
        return cls(expert, parts, device, dense)

    def tokens(self) -> Iterator[_Rows]:
        """What gate and up read."""
        for taken, batch in self.parts:
            dense = None if batch.dense is None else batch.dense[taken].to(self.device)
            yield self._rows(taken, batch, batch.x[taken].to(self.device), dense)

    def activated(self) -> Iterator[_Rows]:
        """What down reads, after gate and up."""
        for (taken, batch), dense in zip(self.parts, self.dense, strict=True):
            x = batch.x[taken].to(self.device)
            x = self.expert.read_by_last(x) if len(taken) else x
            yield self._rows(taken, batch, x, None if dense is None else dense.to(self.device))

    @staticmethod
    def _rows(
        taken: torch.Tensor, batch: Batch, x: torch.Tensor, dense: torch.Tensor | None
    ) -> _Rows:
        if not len(taken):
            return None, batch.lanes_ended
        return (x, batch.weights[taken.to(batch.weights.device)], dense), batch.lanes_ended
