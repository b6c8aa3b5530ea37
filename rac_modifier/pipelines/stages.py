"""A model cut into stages, each beginning where a group of modules reads one tensor (q/k/v, o, gate/up, down)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from llmcompressor.pipelines.cache import IntermediatesCache
from llmcompressor.pipelines.sequential.helpers import Subgraph, trace_subgraphs
from transformers import PreTrainedModel


class UntraceableError(Exception):
    """Why a model cannot be cut into stages."""


@dataclass(frozen=True)
class Stage:
    """Modules that read the same tensor, and the stretch of the model from them to the next such modules.

    Attributes:
        modules: what is pruned before the stage runs; empty in the head of the model.
        reads: name under which the cache holds the tensor that they read.
        subgraphs: upstream's subgraphs, to be run in turn.
    """

    modules: list[torch.nn.Module]
    reads: str | None
    subgraphs: list[Subgraph]

    def run(self, model: torch.nn.Module, cache: IntermediatesCache, batch: int) -> None:
        """Run the stage for one batch, replacing what it consumed in the cache by what it made."""
        for subgraph in self.subgraphs:
            made = subgraph.forward(model, **cache.fetch(batch, subgraph.input_names))  # type: ignore[arg-type]
            cache.update(batch, made)
            cache.delete(batch, subgraph.consumed_names)  # type: ignore[arg-type]


def trace_stages(
    model: PreTrainedModel, sample: dict[str, Any], names: Mapping[torch.nn.Module, str], ignore: Sequence[str]
) -> list[Stage]:
    """Trace `model` down to the modules of `names` and cut it before each group of them.

    Upstream's partition starts a subgraph at each target, so that whatever a target reads was made before its subgraph.

    Raises:
        UntraceableError: the model's code cannot be traced that far (a loop over experts, say), or does not call each
            module once.
    """
    try:
        subgraphs = trace_subgraphs(model, sample, list(names.values()), list(ignore), 1)
    except Exception as error:  # tracing runs the model's own code and may fail in any way
        raise UntraceableError(f"tracing failed: {(str(error).splitlines() or [repr(error)])[0][:200]}") from error
    modules = {name: module for module, name in names.items()}
    calls = [[n for n in s.graph.nodes if n.op == "call_module" and n.target in modules] for s in subgraphs]
    times: dict[str, int] = dict.fromkeys(modules, 0)
    for node in itertools.chain.from_iterable(calls):
        times[node.target] += 1
    odd = next((name for name, count in times.items() if count != 1), None)
    if odd is not None:
        raise UntraceableError(f"{odd} is called {times[odd]} times in the traced model")

    stages: list[Stage] = []
    for subgraph, nodes in zip(subgraphs, calls, strict=True):
        if not nodes:
            if not stages:
                stages.append(Stage([], None, []))
            stages[-1].subgraphs.append(subgraph)
            continue
        (node,) = nodes
        if not (node.args and isinstance(node.args[0], torch.fx.Node) and node.args[0].op == "placeholder"):
            raise UntraceableError(f"{node.target} does not get its input as the first argument")
        reads = node.args[0].name
        # neighbours only: a module that reads the same tensor later may have to run after others were pruned
        if not (stages and stages[-1].reads == reads):
            stages.append(Stage([], reads, []))
        stages[-1].modules.append(modules[node.target])
        stages[-1].subgraphs.append(subgraph)
    return stages
