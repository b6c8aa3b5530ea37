"""What a run costs, counted in multiply-adds before it begins: forward passes, second moments, solver.

Attention between tokens, passes over memory and sampling are not counted, and all products count alike, though some are in
bfloat16 where that is faster (narrow.py). A group-by-group run runs every module but those of the last group once, and with
the dense target also in the dense model. A layer-by-layer run makes two passes over each layer, the first one up to its last
group, the second one not over the last layer. A refit is counted with all steps that it may take.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from rac_modifier.llmcompressor.sensitivity import TOKENS as SENSITIVITY_TOKENS
from rac_modifier.model_tools import StopForward
from rac_modifier.pruning import alps
from rac_modifier.pruning.hessian import block_columns


@dataclass(frozen=True)
class Group:
    """Modules that read the same input of `columns` numbers; `rows` has the outputs of each, `layer` tells layers apart."""

    columns: int
    rows: tuple[int, ...]
    layer: str = ""

    @property
    def weights(self) -> int:
        """Weights of all its modules."""
        return self.columns * sum(self.rows)


@dataclass(frozen=True)
class Plan:
    """Those settings of a run that decide its cost, as the modifier names them."""

    solver: str
    refit: bool
    reconstruct: str
    order: str
    token_weights: str
    allocation: str
    iterations: int
    refit_steps: int
    tokens: int
    held_out_tokens: int
    rounding_sweeps: int | None = None  # of quantization; None without


@dataclass(frozen=True)
class Cost:
    """Multiply-adds by what they are for."""

    forward: float
    second_moments: float
    solver: float
    options: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.forward + self.second_moments + self.solver + self.options

    def describe(self) -> str:
        """One line."""
        parts = {name.replace("_", " "): value for name, value in asdict(self).items() if value}
        shares = ", ".join(f"{name} {value / self.total:.0%}" for name, value in parts.items())
        return f"{self.total:.2g} multiply-adds ({shares})"


def run_cost(groups: Sequence[Group], plan: Plan) -> Cost:
    """The cost of pruning `groups`, in the order in which the model runs them."""
    weights = sum(group.weights for group in groups)
    dense_target = plan.reconstruct == "dense" and plan.order != "layer"
    layers = [list(of) for _, of in itertools.groupby(groups, key=lambda group: group.layer)]
    if plan.order == "layer":
        run = 2 * weights - sum(layer[-1].weights for layer in layers) - sum(group.weights for group in layers[-1])
    else:
        run = (1 + dense_target) * (weights - groups[-1].weights)
    extra = 3 * plan.tokens if plan.token_weights == "gradient" else 0
    if plan.allocation == "kl":
        extra += (sum(len(group.rows) for group in groups) + 1) * SENSITIVITY_TOKENS
    extra += 2 * plan.held_out_tokens
    return Cost(
        forward=plan.tokens * run,
        second_moments=sum(_second_moments(group, plan.tokens, dense_target) for group in groups),
        solver=sum(_solver(group, plan, dense_target) for group in groups),
        options=extra * weights,
    )


def _second_moments(group: Group, tokens: int, dense_target: bool) -> float:
    d, r = group.columns, sum(group.rows)
    blocks = -(-d // block_columns(d))
    hessian = tokens * d * d * (1 + 1 / blocks) / 2
    if not dense_target:
        return hessian
    return hessian + (tokens * d * d + r * d * d if r >= d / 2 else 2 * tokens * r * d)  # as statistics.py has it


def _solver(group: Group, plan: Plan, dense_target: bool) -> float:
    d, r = group.columns, sum(group.rows)
    product, factor, inverse = float(d * d * r), d**3 / 6, d**3 / 2  # Cholesky, and what follows from it
    cost = factor + product if dense_target else 0.0
    cost += product / 2  # what the weights give, to which errors are relative
    if plan.solver == "sparsegpt":
        cost += (0.0 if dense_target else factor) + product / 2
    elif plan.solver == "alps":
        cost += (
            len(alps._stages(plan.iterations)) * (factor if d > alps._INVERSE_UP_TO * r else inverse)
            + plan.iterations * product
        )
    if plan.solver in ("alps", "keep") or plan.refit:
        cost += (plan.refit_steps + 1) * product
    if plan.solver != "sparsegpt" or plan.refit:
        cost += product / 2  # errors
    if plan.rounding_sweeps is not None:
        cost += (0.0 if dense_target else factor) + product / 2  # GPTQ
        cost += (plan.rounding_sweeps + 1) * product  # coordinate descent, and errors with what they are relative to
    return cost


@torch.no_grad()
def groups_by_input(model: Any, names: Mapping[torch.nn.Module, str]) -> list[Group]:
    """The modules of `names` by the input tensor that they read, from a forward pass of two tokens.

    Works on the meta device too, where nothing is computed. A module that is not reached (an expert) stands alone.
    """
    found: list[tuple[torch.Tensor | None, list[torch.nn.Module]]] = []

    def watch(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        for tensor, modules in found:
            if tensor is args[0]:
                modules.append(module)
                return
        found.append((args[0], [module]))

    with _hooked(model, names, watch), contextlib.suppress(StopForward):
        device = model.get_input_embeddings().weight.device
        options = {"input_ids": torch.ones(1, 2, dtype=torch.long, device=device), "use_cache": False}
        if device.type == "meta":  # transformers looks into the values of other masks
            options["attention_mask"] = torch.zeros(1, 1, 2, 2, device=device)
        model(**options)
    reached = {module for _, modules in found for module in modules}
    found += [(None, [module]) for module in names if module not in reached]
    return [_group(modules, names[modules[0]]) for _, modules in found]


def _group(modules: Sequence[torch.nn.Module], name: str) -> Group:
    """The layer is the name up to its first number: model.layers.3 of model.layers.3.mlp.up_proj."""
    shapes: list[tuple[int, int]] = [tuple(module.weight.shape) for module in modules]  # type: ignore[arg-type]
    layer = re.match(r"(.+?\.\d+)(?:\.|$)", name)
    return Group(shapes[0][1], tuple(rows for rows, _ in shapes), layer[1] if layer else "")


@contextlib.contextmanager
def _hooked(model: Any, names: Mapping[torch.nn.Module, str], watch: Any) -> Iterator[None]:
    def stop(module: torch.nn.Module, args: Any) -> None:
        raise StopForward

    hooks = [module.register_forward_pre_hook(watch) for module in names]
    if (head := model.get_output_embeddings()) is not None and head not in names:
        hooks.append(head.register_forward_pre_hook(stop))
    training = model.training
    try:
        model.eval()
        yield
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
