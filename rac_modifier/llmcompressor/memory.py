"""How much memory pruning needs beside the model, predicted before it starts, so that a run that cannot fit ends at once.

The peak comes with one group of modules that read the same input, of d columns and r output rows together. It is the sum of

    kept   tokens (d + hidden) * bytes of an activation * streams      what the group reads, and the residual stream
           tokens hidden * bytes of an activation                      layer by layer: the residual stream alone
           and as much once more for routed experts with the dense target: the dense model's inputs stay while they are pruned
    work   the larger of    statistics   4 (2 (1 + dense) d^2 + c rows d)   Hessian and cross moment, each with that of a lane
                                                                            (pruning/lane_sum.py), inputs in float32
                            solving      4 (a d^2 + b r d)                  Hessian, its factor, weights, the solver's buffers

where dense is 1 with the dense target (then there are two streams of activations and a cross moment), else 0, and rows those of a
batch, at most 4,096. Solving counts as often as experts are solved at once. The numbers a, b and c below were measured on the
solvers; tests/llmcompressor/test_memory.py holds the prediction within 0.8 to 1.25 of the measured peak of all tensors. A process
grows by more: by what the allocator keeps, and the scratch space of products (measured: docs/results/experts.md). Not counted are
forward passes (attention, one batch at a time) and, layer by layer, Hessians of a layer's smaller groups but those of experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import psutil
import torch
from llmcompressor.modeling.moe.linear_experts import LinearExperts2D
from loguru import logger
from transformers import PreTrainedModel

from rac_modifier.calibration.loader import CalibrationLoader
from rac_modifier.errors import RacError
from rac_modifier.llmcompressor.experts import find_experts
from rac_modifier.pruning.hessian import ROWS
from rac_modifier.pruning.sparsegpt import at_once
from rac_modifier.settings.entries import PruningEntry
from rac_modifier.settings.pruning import Method

_FLOAT32, _CPU = 4, torch.device("cpu")
_SCORES_ONLY: tuple[Method, ...] = ("wanda", "magnitude")  # methods that factor no Hessian


@dataclass(frozen=True)
class GroupShape:
    """Modules that read the same input of `columns` numbers, named after the first; `rows` counts the outputs of all.

    `beside` are bytes of other groups' statistics, which are kept meanwhile. `alike` is the number of groups of this shape that
    may be solved at once; 0: those of a layer's experts, where the model has some.
    """

    name: str
    columns: int
    rows: int
    beside: int = 0
    alike: int = 0

    @classmethod
    def of(cls, names: dict[torch.nn.Module, str], modules: Sequence[torch.nn.Module]) -> GroupShape:
        """The shape of some of the modules of `names`."""
        shapes = [tuple(module.weight.shape) for module in modules]  # type: ignore[arg-type]
        return cls(names[modules[0]], shapes[0][1], sum(rows for rows, _ in shapes))

    @classmethod
    def by_layer(cls, model: torch.nn.Module, names: dict[torch.nn.Module, str]) -> list[GroupShape]:
        """Of a run that goes layer by layer, as far as is known before: module by module, and the experts of a layer together.

        They all read every token there: gate and up of all of them are one group, and the Hessian of each down is kept meanwhile.
        """
        left, found = dict(names), []
        for routed in find_experts(model, names):
            for module in routed.modules:
                left.pop(module, None)
            first = [module for expert in routed.experts for module in expert.first]
            last = [cls.of(names, expert.last) for expert in routed.experts if expert.last]
            kept = sum(_FLOAT32 * one.columns**2 for one in last)
            found += [replace(cls.of(names, first), beside=kept)] if first else []
            found += [replace(one, beside=kept, alike=len(last)) for one in last[:1]]
        return found + [cls.of(names, [module]) for module in left]


@dataclass(frozen=True)
class MemoryNeed:
    """What decides how much memory the groups of a run need.

    Attributes:
        tokens: with padding, of the whole calibration set.
        batch_tokens: with padding, of its largest batch.
        hidden: width of the residual stream.
        activation_bytes: of one number of an activation.
        by_layer: whether activations are kept between layers only, and not between groups.
        dense_target: whether the dense model's activations are kept beside the pruned model's.
        solver: of the recipe.
        refits: whether kept weights are fitted anew or rounded after the mask is chosen.
        experts: the most routed experts of a layer, 0 where there are none.
    """

    tokens: int
    batch_tokens: int
    hidden: int
    activation_bytes: int
    by_layer: bool
    dense_target: bool
    solver: Method
    refits: bool
    experts: int = 0

    @classmethod
    def of(
        cls,
        entry: PruningEntry,
        loader: CalibrationLoader | None,
        model: PreTrainedModel,
        *,
        by_layer: bool,
        processes: int = 1,
    ) -> MemoryNeed:
        """What a recipe's entry needs in this process; without a `loader`, for its share of the tokens that are asked for."""
        embedding: torch.Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]
        sizes = [weights.numel() for weights in loader.token_weights] if loader else []
        return cls(
            tokens=sum(sizes) or -(-entry.calibration.tokens // processes),
            batch_tokens=max(sizes, default=min(entry.calibration.tokens, entry.calibration.batch_tokens)),
            hidden=embedding.shape[1],
            activation_bytes=embedding.element_size(),
            by_layer=by_layer,
            dense_target=entry.reconstruct == "dense" and not by_layer,
            solver=entry.solver,
            refits=entry.refits or entry.quantization is not None,
            experts=max((m.num_experts for m in model.modules() if isinstance(m, LinearExperts2D)), default=0),
        )

    def kept(self, group: GroupShape) -> int:
        """Bytes of activations that are kept while this group is pruned."""
        width = self.hidden if self.by_layer else group.columns + self.hidden
        streams = 2 if self.dense_target else 1
        held = self.hidden if self.experts and self.dense_target else 0
        return self.tokens * (width * streams + held) * self.activation_bytes

    def work(self, group: GroupShape, device: torch.device = _CPU) -> int:
        """Bytes that this group's statistics and its solver need on `device` at their peak."""
        square, buffer = group.columns**2, group.columns * group.rows
        dense = int(self.dense_target)
        squares = 2 + 2 * dense if self.solver in _SCORES_ONLY else 3.5 + 1.5 * dense
        buffers = (8 if self.refits else 4.5) + 2 * dense
        inputs = min(self.batch_tokens, ROWS) * group.columns * (2 + 2 * dense)
        alike = group.alike or (1 if self.by_layer else max(self.experts, 1))
        together = min(at_once(group.columns, group.rows, device), alike) if self.solver == "sparsegpt" else 1
        # of experts that are solved with this one
        finished = 0 if self.by_layer else (together - 1) * (1 + dense) * square
        statistics = 2 * (1 + dense) * square + inputs + finished
        solving = together * (squares * square + buffers * buffer)
        return int(max(2 * group.beside + _FLOAT32 * statistics, group.beside + _FLOAT32 * solving))


def check_memory(
    need: MemoryNeed,
    groups: Sequence[GroupShape],
    onload: torch.device,
    offload: torch.device,
    free: Callable[[torch.device], int | None] | None = None,
    *,
    processes: int = 1,
) -> None:
    """Refuse a run whose largest group needs more memory than is free; say how much that is.

    Statistics and solver use `onload`, activations are kept on `offload`; where both are one device, both count there.
    Of several processes on one machine, each has a device of its own, and an equal part of the memory of the host.

    Raises:
        RacError: naming the module, the bytes needed and free, and what to change.
    """
    free = free or free_bytes
    doing = "quantizing" if need.solver == "none" else "pruning"
    parts: list[tuple[torch.device, Callable[[GroupShape], int]]]
    parts = [(onload, lambda group: need.work(group, onload)), (offload, need.kept)]
    if onload == offload:
        parts = [(onload, lambda group: need.work(group, onload) + need.kept(group))]
    for device, bytes_of in parts:
        largest = max(groups, key=bytes_of)
        needed, available = bytes_of(largest), free(device)
        if available is not None and device.type == "cpu":
            available //= processes
        message = f"{doing} {largest.name} is predicted to need {_gib(needed)} on {device} beside the model"
        if available is None:
            logger.info(f"{message}; how much is free there is not known, so it is not checked")
        elif needed > available:
            raise RacError(f"{message}, and {_gib(available)} are free: {_next_step(need, largest, bytes_of(largest))}")
        else:
            logger.info(f"{message}; {_gib(available)} are free")


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can still be allocated on a device; None where that cannot be found out."""
    if device.type == "cpu":
        return int(psutil.virtual_memory().available)
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # PyTorch's own reserve
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    return None


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB ({count:,} bytes)"


def _next_step(need: MemoryNeed, group: GroupShape, needed: int) -> str:
    """What would help most: fewer activations, smaller batches, or a lighter method."""
    steps = []
    if need.kept(group) > needed / 4:
        steps.append(f"set a lower calibration.tokens ({need.tokens:,} tokens are calibrated on now)")
    if min(need.batch_tokens, ROWS) * group.columns * _FLOAT32 > needed / 8:
        below = min(need.batch_tokens, ROWS)  # of a larger batch no more are converted at once
        steps.append(f"set calibration.batch_tokens below {below:,} (the largest batch has {need.batch_tokens:,})")
    if need.dense_target:
        steps.append("set reconstruct: pruned, which keeps one model's activations instead of two")
    if not need.by_layer:
        steps.append("set preset: paper, which keeps activations between layers only")
    steps.append(f"add {group.name} to ignore")
    return ", or ".join(steps)
