"""Where the trained parameters are: whole in one process, or a shard in each of several (FSDP2).

With several processes a copy of the model is trained. Weights, gradients and moments of each decoder
layer are sharded, and its weights are gathered while it runs; embeddings and head are whole in every
process. Each process takes its share of every batch, and gradients are summed, so the result is that of
one process but for the order of sums.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from rac_modifier.errors import RacError
from rac_modifier.evaluation.teacher_forcing import TokenSequence
from rac_modifier.processes import Processes
from rac_modifier.recovery.fixed_mask import FixedMask
from rac_modifier.recovery.recomputing import decoder_layers

Batch = Sequence[TokenSequence]


class Whole:
    """The model in one process: `parameters` are trained, and hooks of `fixed_mask` hold the zeros."""

    def __init__(self, model: Any, parameters: Mapping[str, torch.nn.Parameter]):
        self.model = model
        self.parameters = dict(parameters)
        self.processes = Processes()

    def own(self, batches: Sequence[Batch]) -> list[tuple[Batch, float]]:
        """Return the batches of this process, each with the weight of its loss."""
        return [(batch, 1.0) for batch in batches]

    def local(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return this process's shard of a parameter, gradient or moment; memory is shared."""
        return tensor.detach()

    def part(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        """Return this process's shard of a tensor like the parameter `name`."""
        return whole

    def like(self, name: str, part: torch.Tensor) -> torch.Tensor:
        """Return a tensor like the parameter `name` from the shards of all processes."""
        return part.to(self.parameters[name].device)

    def whole(self, name: str, part: torch.Tensor) -> torch.Tensor:
        """Gather the shards on the CPU; all processes call it."""
        return part.cpu()

    def mask_gradients(self) -> None:
        """Mask gradients before they are clipped."""

    def mask_weights(self) -> None:
        """Mask weights after an optimizer step."""

    def put_back(self) -> None:
        """Give the model the weights of the trained copy."""


class Sharded(Whole):
    """A copy of the model, sharded over several processes.

    Args:
        model: with the parameters to train, in float32.
        parameters: of `model`, by name; `put_back` writes to them.
        mask: of `model`; its hooks are released, since the copy is trained.
        processes: more than one.

    Raises:
        RacError: a model without marked layers, or a trained parameter outside of its decoder.
    """

    def __init__(
        self,
        model: Any,
        parameters: Mapping[str, torch.nn.Parameter],
        mask: FixedMask,
        processes: Processes,
    ):
        assert processes.device is not None
        mask.release()
        self._originals = dict(parameters)
        student = copy.deepcopy(model)
        layers = decoder_layers(student, "torchrun")
        frozen = {p for p in student.parameters() if not p.requires_grad}
        mesh = init_device_mesh(processes.device.type, (processes.count,))
        for layer in layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(student.get_decoder(), mesh=mesh, ignored_params=frozen)
        for part in (student.get_input_embeddings(), student.get_output_embeddings()):
            part.to(processes.device)
        super().__init__(
            student, {name: p for name, p in student.named_parameters() if p.requires_grad}
        )
        self.processes = processes
        if outside := [name for name, p in self.parameters.items() if not isinstance(p, DTensor)]:
            raise RacError(
                f"{outside[0]} is trained and not part of the decoder of {type(model).__name__}, which "
                "processes shard; start rac recover without torchrun"
            )
        self._masks = {
            name: self.part(name, keep).to(processes.device) for name, keep in mask.masks.items()
        }

    def own(self, batches: Sequence[Batch]) -> list[tuple[Batch, float]]:
        """Take every `count`-th sequence of each batch.

        All processes run the same number of batches; one without a sequence has weight 0.
        """
        parts = [batch[self.processes.rank :: self.processes.count] for batch in batches]
        return [
            (part, 1.0) if part else (batch[:1], 0.0)
            for part, batch in zip(parts, batches, strict=True)
        ]

    def local(self, tensor: torch.Tensor) -> torch.Tensor:
        """See `Whole`."""
        return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()

    def part(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        """See `Whole`: equal chunks of rows; the last ones may be smaller or empty."""
        chunks = whole.chunk(self.processes.count)
        return chunks[self.processes.rank] if self.processes.rank < len(chunks) else whole[:0]

    def like(self, name: str, part: torch.Tensor) -> torch.Tensor:
        """See `Whole`."""
        parameter: Any = self.parameters[name]
        return DTensor.from_local(
            part.to(parameter.device),
            parameter.device_mesh,
            parameter.placements,
            shape=parameter.shape,
            stride=parameter.stride(),
        )

    def whole(self, name: str, part: torch.Tensor) -> torch.Tensor:
        """See `Whole`."""
        gathered: Any = self.like(name, part)
        return gathered.full_tensor().cpu()

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """See `Whole`: FSDP sets gradients of shards itself, so no hook of a parameter runs."""
        for name, keep in self._masks.items():
            if (gradient := self.parameters[name].grad) is not None:
                self.local(gradient).mul_(keep)

    @torch.no_grad()
    def mask_weights(self) -> None:
        """See `Whole`."""
        for name, keep in self._masks.items():
            self.local(self.parameters[name]).mul_(keep)

    @torch.no_grad()
    def put_back(self) -> None:
        """See `Whole`."""
        for name, parameter in self.parameters.items():
            self._originals[name].copy_(self.whole(name, self.local(parameter)))


def spread(
    model: Any, parameters: Mapping[str, torch.nn.Parameter], mask: FixedMask, processes: Processes
) -> Whole:
    """Return `Whole` for a single process, else `Sharded`."""
    if processes.count == 1:
        return Whole(model, parameters)
    return Sharded(model, parameters, mask, processes)
