"""A model cut into stages. A stage begins where a group of modules reads one tensor (q/k/v, o, gate/up, down).

The routed experts of a layer are one stage: what their modules read is no tensor of the traced model.
"""

from __future__ import annotations

import contextlib
import itertools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from llmcompressor.pipelines.cache import IntermediatesCache
from llmcompressor.pipelines.sequential.helpers import Subgraph, trace_subgraphs
from llmcompressor.pipelines.sequential.transformers_helpers import HFTracer
from transformers import PreTrainedConfig, PreTrainedModel

from rac_modifier.llmcompressor.experts import RoutedExperts, find_experts


class UntraceableError(Exception):
    """A model cannot be cut into stages; the message is the reason."""


@dataclass(frozen=True)
class Stage:
    """Modules that read the same tensor, and the part of the model from them up to the next such modules.

    Attributes:
        modules: what is pruned before the stage runs; empty at the beginning of the model.
        reads: name of the tensor that they read, in the cache.
        subgraphs: upstream's subgraphs, to be run one after another.
        configs: the model's configs, by the names of the graph's nodes that return them; the same for all stages.
        experts: what the stage begins with, where it is a layer of routed experts; `reads` is then what the router is given.
        chosen: name of the tensor with the numbers of each token's experts, in the cache.
    """

    modules: list[torch.nn.Module]
    reads: str | None
    subgraphs: list[Subgraph]
    configs: Mapping[str, PreTrainedConfig]
    experts: RoutedExperts | None = None
    chosen: str | None = None

    @property
    def groups(self) -> list[list[torch.nn.Module]]:
        """Its modules, those together that read the same input."""
        if self.experts is not None:
            return [group for expert in self.experts.experts for group in expert.groups]
        return [self.modules] if self.modules else []

    def run(self, model: torch.nn.Module, cache: IntermediatesCache, batch: int) -> None:
        """Run the stage for one batch; in the cache, its outputs take the place of the inputs that no later stage reads."""
        for subgraph in self.subgraphs:
            made = self._forward(subgraph, model, cache, batch)
            cache.update(
                batch, {name: value for name, value in made.items() if name not in self.configs}
            )
            cache.delete(batch, list(subgraph.consumed_names - self.configs.keys()))

    def look(self, model: torch.nn.Module, cache: IntermediatesCache, batch: int) -> None:
        """Run a stage of one subgraph for one batch, only for the hooks of its modules; the cache is not changed."""
        (subgraph,) = self.subgraphs
        self._forward(subgraph, model, cache, batch)

    def _forward(
        self, subgraph: Subgraph, model: torch.nn.Module, cache: IntermediatesCache, batch: int
    ) -> dict[str, Any]:
        inputs = cache.fetch(batch, subgraph.input_names)  # type: ignore[arg-type]
        inputs |= {name: self.configs[name] for name in self.configs.keys() & subgraph.input_names}
        return subgraph.forward(model, **inputs)


def trace_stages(
    model: PreTrainedModel,
    sample: dict[str, Any],
    names: Mapping[torch.nn.Module, str],
    ignore: Sequence[str],
) -> list[Stage]:
    """Trace `model` down to the modules of `names`, or the routed experts that hold them, and cut it before each group of them.

    Upstream starts a subgraph at each target, so what a target reads is an output of the subgraphs before it.

    Raises:
        UntraceableError: the model's code cannot be traced that far, does not call each module once, or changes tensors in
            place (for example where a mixture of experts adds up their outputs).
    """
    experts = {found.name: found for found in find_experts(model, names)}
    inside = {module for found in experts.values() for module in found.modules}
    modules = {name: [module] for module, name in names.items() if module not in inside}
    modules |= {name: found.modules for name, found in experts.items()}
    try:
        with _restoring_after_failure(model):
            subgraphs = trace_subgraphs(model, sample, list(modules), list(ignore), 1)
    except Exception as error:  # tracing runs the model's own code and may fail in any way
        raise UntraceableError(
            f"tracing failed: {(str(error).splitlines() or [repr(error)])[0][:200]}"
        ) from error
    _refuse_changes_in_place(subgraphs)
    configs = use_own_configs(model, subgraphs)
    calls = [
        [n for n in s.graph.nodes if n.op == "call_module" and n.target in modules]
        for s in subgraphs
    ]
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
                stages.append(Stage([], None, [], configs))
            stages[-1].subgraphs.append(subgraph)
            continue
        (node,) = nodes
        reads, routed = _argument(node, 0), experts.get(node.target)
        # only neighbours: one that reads the same tensor later may have to run after other modules are pruned
        if routed is not None or not (
            stages and stages[-1].reads == reads and stages[-1].experts is None
        ):
            chosen = None if routed is None else _argument(node, 1)
            stages.append(Stage([], reads, [], configs, routed, chosen))
        stages[-1].modules.extend(modules[node.target])
        stages[-1].subgraphs.append(subgraph)
    return stages


def _argument(node: torch.fx.Node, place: int) -> str:
    """The name of the tensor that a module is called with, which must be made by an earlier subgraph."""
    given = node.args[place] if place < len(node.args) else None
    if not (isinstance(given, torch.fx.Node) and given.op == "placeholder"):
        raise UntraceableError(f"{node.target} does not get its input as argument {place + 1}")
    return given.name


@contextlib.contextmanager
def _restoring_after_failure(model: PreTrainedModel) -> Iterator[None]:
    """Restore what upstream's tracer leaves replaced when tracing fails: functions of torch, and cache classes in model code.

    With the classes of the tracer, the model would not run with a cache any more, for example in `generate`.
    """
    functions = {name: getattr(torch, name) for name in HFTracer._TORCH_METHODS_TO_PATCH}
    namespaces = {
        id(space): space for space in (module.forward.__globals__ for module in model.modules())
    }
    classes = [
        (space, name, value)
        for space in namespaces.values()
        for name, value in space.items()
        if any(value is replaced for replaced in HFTracer._CLASSES_TO_PATCH)
    ]
    try:
        yield
    except BaseException:
        for name, function in functions.items():
            setattr(torch, name, function)
        for space, name, value in classes:
            space[name] = value
        raise


def _refuse_changes_in_place(subgraphs: Sequence[Subgraph]) -> None:
    """Refuse a graph in which a tensor is changed in place and read elsewhere.

    Upstream orders nodes by what they read, not by what they change. So the outputs of a mixture's experts could be added up
    after the next layer has read the sum.
    """
    for node in (node for subgraph in subgraphs for node in subgraph.graph.nodes):
        in_place = (
            node.op == "call_method"
            and node.target.endswith("_")
            and not node.target.endswith("__")
        )
        if not (in_place or node.target is operator.setitem):
            continue
        changed = node.args[0]
        if changed.op == "placeholder" or len(changed.users) > 1:
            raise UntraceableError(
                f"the model changes a tensor in place ({node.name}) that is read elsewhere too"
            )


def use_own_configs(
    model: PreTrainedModel, subgraphs: Sequence[Subgraph]
) -> dict[str, PreTrainedConfig]:
    """Make each node that builds a config return the model's own config; returns these configs by the names of the nodes.

    Where a config is an argument of a function, upstream's tracer writes a call that builds a new config from its entries. The
    attention implementation that calibration sets is no entry, so the new config lacks it, and the causal mask is missing
    (observed in Qwen3-MoE). A cache cannot hold a config either, so `Stage.run` passes it from stage to stage.
    """
    configs: dict[str, PreTrainedConfig] = {}
    for node in (node for subgraph in subgraphs for node in subgraph.graph.nodes):
        if isinstance(node.target, type) and issubclass(node.target, PreTrainedConfig):
            own = next(
                (
                    m.config
                    for m in model.modules()
                    if type(getattr(m, "config", None)) is node.target
                ),
                None,
            )
            if own is None:
                raise UntraceableError(
                    f"the traced model builds a {node.target.__name__}, which none of its modules has"
                )
            configs[node.name] = own  # type: ignore[assignment]
            node.target, node.args, node.kwargs = _constant(own), (), {}
    return configs


def _constant(value: Any) -> Callable[[], Any]:
    def own_config() -> Any:
        return value

    return own_config
