"""Prune the routed experts of a layer, each on its own tokens: gate and up, then down on what the pruned gate and up make."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from compressed_tensors.utils import align_module_device
from llmcompressor.pipelines.cache import IntermediatesCache

from rac_modifier.calibration.loader import CalibrationLoader
from rac_modifier.llmcompressor.experts import Expert, RoutedExperts
from rac_modifier.llmcompressor.plan import Stage
from rac_modifier.llmcompressor.run import Run
from rac_modifier.llmcompressor.solving import problems_per_call
from rac_modifier.llmcompressor.statistics import InputGroup
from rac_modifier.pruning.routed_tokens import ExpertTokens, all_rows, filled_up, routed_rows


@dataclass(frozen=True)
class RouterBatch:
    """What the router reads in one batch, tokens in rows, where the cache keeps it.

    Attributes:
        x: [tokens, hidden] in the pruned model.
        dense: the same in the dense model; None where it is not needed.
        chosen: [tokens, k], the numbers of each token's experts in the pruned model.
        weights: [tokens], of the calibration set.
        number: place of the batch in the calibration set of all processes.
        shards_ended: how many shards end with it.
    """

    x: torch.Tensor
    dense: torch.Tensor | None
    chosen: torch.Tensor
    weights: torch.Tensor
    number: int
    shards_ended: int


def read_router(
    stage: Stage,
    pruned: IntermediatesCache,
    dense: IntermediatesCache | None,
    loader: CalibrationLoader,
) -> list[RouterBatch]:
    """Return what the router of a stage reads; it stays when the stage has run and the caches have dropped it."""

    def value(cache: IntermediatesCache, number: int, name: str | None) -> torch.Tensor:
        tensor: torch.Tensor = cache.batch_intermediates[number][str(name)].value  # type: ignore[assignment]
        return tensor.reshape(-1, tensor.shape[-1])

    return [
        RouterBatch(
            value(pruned, number, stage.reads),
            None if dense is None else value(dense, number, stage.reads),
            value(pruned, number, stage.chosen),
            weights.reshape(-1),
            loader.numbers[number],
            loader.shards_ended[number],
        )
        for number, weights in enumerate(loader.token_weights)
    ]


def prune_experts(
    layer: RoutedExperts, batches: Sequence[RouterBatch], run: Run, device: torch.device
) -> None:
    """Prune the experts of a layer; each of several processes solves a few experts at a time where they are small.

    An expert is calibrated on the tokens that the router sends to it in the pruned model, as in use later, and below
    `expert_floor` on those that it all but sends there; or on all tokens, if the recipe says `experts: all`. The dense model's
    inputs are those of the same tokens.
    """
    entry, processes = run.entry, run.processes
    counted = [(batch.weights > 0).to(batch.chosen.device) for batch in batches]
    rows_by_batch = [
        routed_rows(batch.chosen, real, layer.module.num_experts)
        for batch, real in zip(batches, counted, strict=True)
    ]
    nearness = None if layer.router is None else _Nearness(layer.router, batches, device)
    per_call = min(problems_per_call(g, device, entry) for g in layer.experts[0].groups)
    numbers, step = [batch.number for batch in batches], processes.count * per_call
    tokens: dict[str, ExpertTokens] = {}
    for start in range(0, len(layer.experts), step):
        inputs = []
        for expert in layer.experts[start : start + step]:
            routed = [rows[expert.number] for rows in rows_by_batch]
            if entry.experts == "all":
                rows, counts = all_rows(routed, counted, processes)
            else:
                near = None if nearness is None else partial(nearness.of, expert.number)
                rows, counts = filled_up(
                    routed, counted, entry.expert_floor, processes, near, numbers
                )
            tokens[expert.name] = counts
            inputs.append(_ExpertInputs.of(expert, rows, batches, run, device))
        _prune([(i.expert.first, i.tokens()) for i in inputs], run, device, per_call)
        _prune([(i.expert.last, i.activated()) for i in inputs], run, device, per_call)
    run.experts.add(layer.name, tokens)


class _Nearness:
    """How near tokens are to being routed to an expert: its logit, less the least logit of the chosen experts."""

    def __init__(
        self, router: torch.nn.Module, batches: Sequence[RouterBatch], device: torch.device
    ):
        self._batches, self._device = batches, device
        with align_module_device(router):
            weight = router.get_parameter("weight").detach()
            self._weight = weight.to(device, torch.float32)
        self._least: list[torch.Tensor] | None = None

    def of(self, number: int) -> list[torch.Tensor]:
        """Return for an expert a number per token of each batch."""
        if self._least is None:
            k = self._batches[0].chosen.shape[1]
            self._least = [logits.topk(k).values[:, -1] for logits in self._logits(self._weight)]
        of_expert = self._logits(self._weight[number : number + 1])
        return [
            (logits[:, 0] - least).to(batch.chosen.device)
            for logits, least, batch in zip(of_expert, self._least, self._batches, strict=True)
        ]

    def _logits(self, weight: torch.Tensor) -> Iterator[torch.Tensor]:
        return (batch.x.to(self._device).float() @ weight.T for batch in self._batches)


# Inputs, token weights and inputs in the dense model, None without tokens; and how many shards end with the batch.
_Rows = tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None, int]


def _prune(
    inputs_by_modules: Iterable[tuple[list[torch.nn.Module], Iterable[_Rows]]],
    run: Run,
    device: torch.device,
    per_call: int,
) -> None:
    """Prune modules on what they read, or restore them from an earlier run."""
    groups = []
    for modules, inputs in inputs_by_modules:
        if run.has_pruned(modules):
            run.restore(modules)
        elif modules:
            group = InputGroup.of(modules, device, run.processes, dense_target=run.dense_target)
            for rows, shards_ended in inputs:
                if rows is not None:
                    group.statistics.add(*rows)
                group.statistics.end_shards(shards_ended)
            group.statistics.finish()  # before the next takes memory
            groups.append(group)
    if groups:
        run.prune(groups, per_call)


@dataclass(frozen=True)
class _ExpertInputs:
    """What one expert reads.

    Attributes:
        rows: numbers of its tokens in each batch.
        batches: of the router.
        dense: what its down reads of these tokens in the dense model, by batch; None where it is not needed.
    """

    expert: Expert
    rows: Sequence[torch.Tensor]
    batches: Sequence[RouterBatch]
    dense: Sequence[torch.Tensor | None]
    device: torch.device

    @classmethod
    def of(
        cls,
        expert: Expert,
        rows: Sequence[torch.Tensor],
        batches: Sequence[RouterBatch],
        run: Run,
        device: torch.device,
    ) -> _ExpertInputs:
        """Return the inputs of an expert that is still dense: what its down reads in the dense model is computed here."""
        dense: list[torch.Tensor | None] = [None] * len(batches)
        if expert.last and not run.has_pruned(expert.last):
            for i, (numbers, batch) in enumerate(zip(rows, batches, strict=True)):
                if batch.dense is not None and len(numbers):
                    x = expert.read_by_last(batch.dense[numbers].to(device))
                    dense[i] = x.to(batch.dense.device)
        return cls(expert, rows, batches, dense, device)

    def tokens(self) -> Iterator[_Rows]:
        """Yield what gate and up read."""
        for numbers, batch in zip(self.rows, self.batches, strict=True):
            dense = None if batch.dense is None else batch.dense[numbers].to(self.device)
            yield self._weighed(numbers, batch, batch.x[numbers].to(self.device), dense)

    def activated(self) -> Iterator[_Rows]:
        """Yield what down reads, after gate and up were pruned."""
        for numbers, batch, dense in zip(self.rows, self.batches, self.dense, strict=True):
            x = batch.x[numbers].to(self.device)
            x = self.expert.read_by_last(x) if len(numbers) else x
            yield self._weighed(numbers, batch, x, None if dense is None else dense.to(self.device))

    @staticmethod
    def _weighed(
        numbers: torch.Tensor, batch: RouterBatch, x: torch.Tensor, dense: torch.Tensor | None
    ) -> _Rows:
        if not len(numbers):
            return None, batch.shards_ended
        return (x, batch.weights[numbers.to(batch.weights.device)], dense), batch.shards_ended
