"""Cut a model into stages: the plan of a run.

By group, a stage begins where modules read one tensor (q/k/v, o, gate/up, down); the routed experts of a layer are one stage,
since what their modules read is no tensor of the traced model. By layer, a stage is a decoder layer, as in upstream.
"""

from __future__ import annotations

import contextlib
import itertools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from llmcompressor.args import DatasetArguments
from llmcompressor.pipelines.cache import IntermediatesCache
from llmcompressor.pipelines.sequential.helpers import Subgraph, trace_subgraphs
from llmcompressor.pipelines.sequential.transformers_helpers import HFTracer
from llmcompressor.utils.pytorch.module import infer_sequential_targets
from transformers import PreTrainedConfig, PreTrainedModel

from rac_modifier.llmcompressor.experts import RoutedExperts, find_experts

Order = Literal["group", "layer"]


class UntraceableError(Exception):
    """A model cannot be cut into stages by group; the message is the reason."""


@dataclass(frozen=True)
class Stage:
    """Modules that are pruned together, and the part of the model from them up to the next stage.

    Attributes:
        modules: what is pruned before the stage runs; may be empty at the beginning and at the end of the model.
        reads: name in the cache of the tensor that all of them read; of routed experts, of what the router reads; None by layer.
        subgraphs: upstream's subgraphs, which run one after another.
        configs: the model's configs, by the names of the graph's nodes that return them; the same for all stages.
        experts: the layer of routed experts that the stage begins with.
        chosen: name in the cache of the tensor with the numbers of each token's experts.
    """

    modules: list[torch.nn.Module]
    reads: str | None
    subgraphs: list[Subgraph]
    configs: Mapping[str, PreTrainedConfig] = field(default_factory=dict)
    experts: RoutedExperts | None = None
    chosen: str | None = None

    @property
    def columns(self) -> int:
        """Return the inputs of its modules; 0 where there are none, or where the stage is a layer or routed experts."""
        if self.reads is None or self.experts is not None or not self.modules:
            return 0
        return self.modules[0].get_parameter("weight").shape[1]

    @property
    def groups(self) -> list[list[torch.nn.Module]]:
        """Return its modules by the input that they read; a stage by group."""
        if self.experts is not None:
            return [group for expert in self.experts.experts for group in expert.groups]
        return [self.modules] if self.modules else []

    def run(self, model: torch.nn.Module, cache: IntermediatesCache, batch: int) -> None:
        """Run the stage for one batch; in the cache, outputs replace the inputs that no later stage reads."""
        for subgraph in self.subgraphs:
            outputs = self._forward(subgraph, model, cache, batch)
            cache.update(batch, {n: v for n, v in outputs.items() if n not in self.configs})
            cache.delete(batch, list(subgraph.consumed_names - self.configs.keys()))

    def look(self, model: torch.nn.Module, cache: IntermediatesCache, batch: int) -> None:
        """Run a stage of one subgraph for one batch, for the hooks of its modules alone; the cache is not changed."""
        (subgraph,) = self.subgraphs
        self._forward(subgraph, model, cache, batch)

    def _forward(
        self, subgraph: Subgraph, model: torch.nn.Module, cache: IntermediatesCache, batch: int
    ) -> dict[str, Any]:
        inputs = cache.fetch(batch, subgraph.input_names)  # type: ignore[arg-type]
        inputs |= {name: self.configs[name] for name in self.configs.keys() & subgraph.input_names}
        return subgraph.forward(model, **inputs)


@dataclass(frozen=True)
class Plan:
    """The stages of a run, up to the last one that has modules to prune; in which order, and why in that one."""

    stages: list[Stage]
    order: Order
    why: str


def make_plan(
    model: PreTrainedModel,
    sample: dict[str, Any],
    names: Mapping[torch.nn.Module, str],
    order: Literal["auto", "group", "layer"],
    arguments: DatasetArguments,
) -> Plan:
    """Cut the model by group where the recipe's `order`, `oneshot`'s arguments and its code allow that, else by layer.

    `sample` is a batch, and `names` are the modules to prune.
    """
    stages, why = None, f"order: {order}"
    if arguments.sequential_targets:
        why = f"oneshot was given sequential_targets={arguments.sequential_targets}"
    elif arguments.sequential_targets_per_subgraph != 1:
        why = f"oneshot was given sequential_targets_per_subgraph={arguments.sequential_targets_per_subgraph}"
    elif order != "layer":
        try:
            stages = trace_groups(model, sample, names, arguments.tracing_ignore)
        except UntraceableError as error:
            why = str(error)
    by_group = stages is not None
    stages = stages or trace_layers(model, sample, names, arguments)
    last = max((i for i, stage in enumerate(stages) if stage.modules), default=-1)
    return Plan(stages[: last + 1], "group" if by_group else "layer", why)


def trace_layers(
    model: PreTrainedModel,
    sample: dict[str, Any],
    names: Mapping[torch.nn.Module, str],
    arguments: DatasetArguments,
) -> list[Stage]:
    """Cut the model where upstream's sequential pipeline does."""
    targets: Any = infer_sequential_targets(model, arguments.sequential_targets)
    count = arguments.sequential_targets_per_subgraph
    subgraphs = trace_subgraphs(model, sample, targets, arguments.tracing_ignore, count)
    configs = use_own_configs(model, subgraphs)
    return [
        Stage([m for m in subgraph.submodules(model) if m in names], None, [subgraph], configs)
        for subgraph in subgraphs
    ]


def trace_groups(
    model: PreTrainedModel,
    sample: dict[str, Any],
    names: Mapping[torch.nn.Module, str],
    ignore: Sequence[str],
) -> list[Stage]:
    """Trace the model down to the modules of `names`, or the routed experts that hold them, and cut it before each group.

    Upstream starts a subgraph at each target, so the tensor that a target reads is an output of the subgraphs before it.

    Raises:
        UntraceableError: the model's code cannot be traced that far, does not call each module once, or changes tensors in
            place (for example where a mixture of experts adds up their outputs).
    """
    experts = {layer.name: layer for layer in find_experts(model, names)}
    inside = {module for layer in experts.values() for module in layer.modules}
    modules = {name: [module] for module, name in names.items() if module not in inside}
    modules |= {name: layer.modules for name, layer in experts.items()}
    try:
        with _restoring_after_failure(model):
            subgraphs = trace_subgraphs(model, sample, list(modules), list(ignore), 1)
    except Exception as error:  # tracing runs the model's own code and may fail in any way
        reason = (str(error).splitlines() or [repr(error)])[0][:200]
        raise UntraceableError(f"tracing failed: {reason}") from error
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
        # Only neighbours share a stage: a later module that reads the same tensor may have to run after others are pruned.
        same = stages and stages[-1].reads == reads and stages[-1].experts is None
        if routed is not None or not same:
            chosen = None if routed is None else _argument(node, 1)
            stages.append(Stage([], reads, [], configs, routed, chosen))
        stages[-1].modules.extend(modules[node.target])
        stages[-1].subgraphs.append(subgraph)
    return stages


def _argument(node: torch.fx.Node, place: int) -> str:
    """Return the name of the tensor that a module is called with; an earlier subgraph must make it."""
    value = node.args[place] if place < len(node.args) else None
    if not (isinstance(value, torch.fx.Node) and value.op == "placeholder"):
        raise UntraceableError(f"{node.target} does not get its input as argument {place + 1}")
    return value.name


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
        name = node.target if node.op == "call_method" else ""
        in_place = name.endswith("_") and not name.endswith("__")
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
    configs_by_type: dict[Any, Any] = {
        type(m.config): m.config for m in reversed(list(model.modules())) if hasattr(m, "config")
    }
    configs: dict[str, PreTrainedConfig] = {}
    for node in (node for subgraph in subgraphs for node in subgraph.graph.nodes):
        if isinstance(node.target, type) and issubclass(node.target, PreTrainedConfig):
            if node.target not in configs_by_type:
                raise UntraceableError(
                    f"the traced model builds a {node.target.__name__}, which none of its modules has"
                )
            configs[node.name] = configs_by_type[node.target]
            node.target, node.args, node.kwargs = _constant(configs_by_type[node.target]), (), {}
    return configs


def _constant(value: Any) -> Callable[[], Any]:
    def own_config() -> Any:
        return value

    return own_config
