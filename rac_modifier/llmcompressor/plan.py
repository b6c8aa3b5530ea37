"""Cut a model into stages: the plan of a run.

By group, a stage begins where modules read one tensor (q/k/v, o, gate/up, down); the routed
experts of a layer are one stage. By layer, a stage is a decoder layer, as in upstream.
"""

import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from llmcompressor.args import DatasetArguments
from llmcompressor.pipelines.cache import IntermediatesCache
from llmcompressor.pipelines.sequential.helpers import Subgraph, trace_subgraphs
from llmcompressor.utils.pytorch.module import infer_sequential_targets
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from rac_modifier.llmcompressor.experts import RoutedExperts, find_experts
from rac_modifier.llmcompressor.upstream import contained_tracing


class UntraceableError(Exception):
    """Say why a model cannot be cut into stages by group."""


@dataclass(frozen=True)
class Stage:
    """Hold modules pruned together, and the model up to the next stage; `reads` names a tensor."""

    modules: list[torch.nn.Module]  # may be empty at the beginning and the end of the model
    reads: str | None  # by the modules or the router; None by layer
    subgraphs: list[Subgraph]  # of upstream, which run one after another
    # the model's configs, by the names of the graph's nodes that return them
    configs: Mapping[str, PreTrainedConfig] = field(default_factory=dict)
    experts: RoutedExperts | None = None  # the layer of experts that the stage begins with
    chosen: str | None = None  # the numbers of each token's experts

    @property
    def columns(self) -> int:
        """Return the inputs of its modules; 0 for none, a layer and routed experts."""
        is_group = self.reads is not None and self.experts is None and self.modules
        return self.modules[0].get_parameter("weight").shape[1] if is_group else 0

    def run(
        self, model: torch.nn.Module, cache: IntermediatesCache, batch: int, keep: bool = False
    ) -> None:
        """Run the stage for a batch; its outputs replace its inputs, unless with `keep`."""
        for subgraph in self.subgraphs:
            inputs = cache.fetch(batch, subgraph.input_names)  # type: ignore[arg-type]
            config_names = self.configs.keys() & subgraph.input_names
            outputs = subgraph.forward(
                model, **inputs, **{n: self.configs[n] for n in config_names}
            )
            if keep:
                continue
            cache.update(batch, {n: v for n, v in outputs.items() if n not in self.configs})
            cache.delete(batch, list(subgraph.consumed_names - self.configs.keys()))

    def read(self, cache: IntermediatesCache, batch: int) -> Tensor:
        """Return what a stage by group reads in a batch, [rows, length, columns]."""
        (x,) = cache.fetch(batch, [str(self.reads)]).values()
        return x


def make_plan(
    model: PreTrainedModel,
    sample: dict[str, Any],
    names: Mapping[torch.nn.Module, str],
    order: Literal["auto", "group", "layer"],
    arguments: DatasetArguments,
) -> tuple[list[Stage], str, str]:
    """Cut the model by group if recipe, arguments and code allow, else by layer.

    Return the stages up to the last that prunes, their order ("group" or "layer"), and why.
    """
    stages, why = None, f"order: {order}"
    targets, count = arguments.sequential_targets, arguments.sequential_targets_per_subgraph
    if targets:
        why = f"oneshot was given sequential_targets={targets}"
    elif count != 1:
        why = f"oneshot was given sequential_targets_per_subgraph={count}"
    elif order != "layer":
        try:
            stages = trace_groups(model, sample, names, arguments.tracing_ignore)
        except UntraceableError as error:
            why = str(error)
    by_group = stages is not None
    if stages is None:  # where upstream's sequential pipeline cuts
        where: Any = infer_sequential_targets(model, targets)
        with contained_tracing(model):
            subgraphs = trace_subgraphs(model, sample, where, arguments.tracing_ignore, count)
        configs = use_own_configs(model, subgraphs)
        stages = [
            Stage([m for m in subgraph.submodules(model) if m in names], None, [subgraph], configs)
            for subgraph in subgraphs
        ]
    last = max((i for i, stage in enumerate(stages) if stage.modules), default=-1)
    return stages[: last + 1], "group" if by_group else "layer", why


def trace_groups(
    model: PreTrainedModel,
    sample: dict[str, Any],
    names: Mapping[torch.nn.Module, str],
    ignore: Sequence[str],
) -> list[Stage]:
    """Trace the model down to the modules of `names`, and cut before each group.

    Upstream starts a subgraph at each target, so an earlier one makes the tensor that it reads.
    UntraceableError if the code does not call each module once, or changes tensors in place.
    """
    experts = {layer.name: layer for layer in find_experts(model, names)}
    inside = {module for layer in experts.values() for module in layer.modules}
    modules = {name: [module] for module, name in names.items() if module not in inside}
    modules |= {name: layer.modules for name, layer in experts.items()}
    try:
        with contained_tracing(model):
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
    times = Counter(node.target for nodes in calls for node in nodes)
    if odd := next((name for name in modules if times[name] != 1), None):
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
        # only neighbours: what runs between may have to be pruned before a later module reads
        same = stages and stages[-1].reads == reads and stages[-1].experts is None
        if routed is not None or not same:
            chosen = None if routed is None else _argument(node, 1)
            stages.append(Stage([], reads, [], configs, routed, chosen))
        stages[-1].modules.extend(modules[node.target])
        stages[-1].subgraphs.append(subgraph)
    return stages


def _argument(node: torch.fx.Node, place: int) -> str:
    """Return the name of a module's argument, which an earlier subgraph makes."""
    value = node.args[place] if place < len(node.args) else None
    if not (isinstance(value, torch.fx.Node) and value.op == "placeholder"):
        raise UntraceableError(f"{node.target} does not get its input as argument {place + 1}")
    return value.name


def _refuse_changes_in_place(subgraphs: Sequence[Subgraph]) -> None:
    """Refuse a changed tensor that is read elsewhere: upstream orders nodes by reads alone."""
    for node in (node for subgraph in subgraphs for node in subgraph.graph.nodes):
        name = node.target if node.op == "call_method" else ""
        in_place = name.endswith("_") and not name.endswith("__")
        if in_place or node.target is operator.setitem:
            changed = node.args[0]
            if changed.op == "placeholder" or len(changed.users) > 1:
                raise UntraceableError(
                    f"the model changes a tensor in place ({node.name}) that is read elsewhere too"
                )


def use_own_configs(
    model: PreTrainedModel, subgraphs: Sequence[Subgraph]
) -> dict[str, PreTrainedConfig]:
    """Make nodes that build a config return the model's, which has the attention that was set."""
    modules = [m for m in reversed(list(model.modules())) if hasattr(m, "config")]
    by_type: dict[Any, Any] = {type(module.config): module.config for module in modules}
    configs: dict[str, PreTrainedConfig] = {}
    for node in (node for subgraph in subgraphs for node in subgraph.graph.nodes):
        if isinstance(node.target, type) and issubclass(node.target, PreTrainedConfig):
            if node.target not in by_type:
                raise UntraceableError(
                    f"the traced model builds a {node.target.__name__}, which no module of it has"
                )
            config = configs[node.name] = by_type[node.target]
            node.target, node.args, node.kwargs = (lambda config=config: config), (), {}
    return configs
