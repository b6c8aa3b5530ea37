"""Prune the routed experts of a layer, each on the tokens that its router sends to it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from compressed_tensors.utils import align_module_device
from llmcompressor.pipelines.cache import IntermediatesCache
from torch import Tensor

from rac_modifier.calibration.loader import CalibrationLoader
from rac_modifier.llmcompressor.experts import (
    Expert,
    ExpertTokens,
    RoutedExperts,
    filled_up,
    report_tokens,
    routed_rows,
)
from rac_modifier.llmcompressor.plan import Stage
from rac_modifier.llmcompressor.run import Run
from rac_modifier.llmcompressor.statistics import InputGroup


@dataclass(frozen=True)
class _RouterBatch:
    """Hold what the router reads in a batch, tokens in rows, on the cache's device."""

    x: Tensor  # [tokens, hidden] in the pruned model
    dense: Tensor | None  # the same in the dense model, if it is needed
    chosen: Tensor  # [tokens, k], the numbers of each token's experts
    weights: Tensor  # [tokens], of the calibration set
    number: int  # place in the calibration set of all ranks
    shards_ended: int  # how many shards of the calibration set end with it


def read_router(
    stage: Stage,
    pruned: IntermediatesCache,
    dense: IntermediatesCache | None,
    loader: CalibrationLoader,
) -> list[_RouterBatch]:
    """Return what the router of a stage reads, which the caches drop later."""

    def value(cache: IntermediatesCache, number: int, name: str | None) -> Tensor:
        tensor: Tensor = cache.batch_intermediates[number][str(name)].value  # type: ignore[assignment]
        return tensor.reshape(-1, tensor.shape[-1])

    return [
        _RouterBatch(
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
    layer: RoutedExperts, batches: Sequence[_RouterBatch], run: Run, device: torch.device
) -> None:
    """Prune the experts of a layer, each on its tokens: gate and up, then down on their output."""
    tokens = _ExpertTokens(layer, batches, run, device)
    per_call = min(run.problems_per_call(group, device) for group in layer.experts[0].groups)
    step = run.processes.count * per_call
    for start in range(0, len(layer.experts), step):
        experts = layer.experts[start : start + step]
        rows = [tokens.rows(expert) for expert in experts]
        # while gate and up are dense
        dense = [tokens.dense_of_down(e, r) for e, r in zip(experts, rows, strict=True)]
        for down in (False, True):
            groups = []
            for expert, of_expert, x_dense in zip(experts, rows, dense, strict=True):
                modules = expert.last if down else expert.first
                if run.has_pruned(modules):
                    run.restore(modules)
                elif modules:
                    reader = expert if down else None
                    groups.append(tokens.collect(modules, reader, of_expert, x_dense))
            if groups:
                run.prune(groups, per_call)
    run.experts[layer.name] = report_tokens(layer.name, tokens.counts, run.entry.expert_floor)


class _ExpertTokens:
    """Choose the tokens of each expert, and collect what its modules read."""

    def __init__(
        self, layer: RoutedExperts, batches: Sequence[_RouterBatch], run: Run, device: torch.device
    ):
        self.counts: dict[str, ExpertTokens] = {}
        self._batches, self._run, self._device = batches, run, device
        self._counted = [(batch.weights > 0).to(batch.chosen.device) for batch in batches]
        self._routed = [
            routed_rows(batch.chosen, real, layer.module.num_experts)
            for batch, real in zip(batches, self._counted, strict=True)
        ]
        with align_module_device(layer.router):
            weight = layer.router.get_parameter("weight").detach()
            self._router = weight.to(device, torch.float32)
        self._least: list[Tensor] | None = None

    def rows(self, expert: Expert) -> Sequence[Tensor]:
        """Return the numbers of an expert's tokens in each batch."""
        floor, processes = self._run.entry.expert_floor, self._run.processes
        routed = [rows[expert.number] for rows in self._routed]
        near = partial(self._nearness, expert.number)
        numbers = [batch.number for batch in self._batches]
        rows, self.counts[expert.name] = filled_up(
            routed, self._counted, floor, processes, near, numbers
        )
        return rows

    def _nearness(self, number: int) -> list[Tensor]:
        """Return per token an expert's logit, less the least of the chosen experts."""
        if self._least is None:
            k = self._batches[0].chosen.shape[1]
            self._least = [x.topk(k).values[:, -1] for x in self._logits(self._router)]
        logits = self._logits(self._router[number : number + 1])
        return [
            (x[:, 0] - least).to(batch.chosen.device)
            for x, least, batch in zip(logits, self._least, self._batches, strict=True)
        ]

    def _logits(self, weight: Tensor) -> Iterator[Tensor]:
        return (batch.x.to(self._device).float() @ weight.T for batch in self._batches)

    def dense_of_down(self, expert: Expert, rows: Sequence[Tensor]) -> list[Tensor | None]:
        """Return what an expert's down reads in the dense model, if needed."""
        inputs: list[Tensor | None] = [None] * len(rows)
        if expert.last and not self._run.has_pruned(expert.last):
            for i, (chosen, batch) in enumerate(zip(rows, self._batches, strict=True)):
                if batch.dense is not None and len(chosen):
                    x = expert.input_of_down(batch.dense[chosen].to(self._device))
                    inputs[i] = x.to(batch.dense.device)
        return inputs

    def collect(
        self,
        modules: list[torch.nn.Module],
        expert: Expert | None,
        rows: Sequence[Tensor],
        dense: Sequence[Tensor | None],
    ) -> InputGroup:
        """Collect the statistics of the down of `expert`, or without it of gate and up."""
        run, device = self._run, self._device
        group = InputGroup.of(modules, device, run.processes, dense_target=run.dense_target)
        for chosen, batch, x_dense in zip(rows, self._batches, dense, strict=True):
            if len(chosen):
                x = batch.x[chosen].to(device)
                weights = batch.weights[chosen.to(batch.weights.device)]
                if expert is not None:
                    x = expert.input_of_down(x)
                elif batch.dense is not None:
                    x_dense = batch.dense[chosen]
                group.statistics.add(x, weights, None if x_dense is None else x_dense.to(device))
            group.statistics.end_shards(batch.shards_ended)
        group.statistics.finish()  # before the next takes memory
        return group
