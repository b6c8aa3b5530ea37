"""The model in training: which parameters, in float32, with layers recomputed, over processes.

With several processes a copy of the model is trained by FSDP2; embeddings and head are whole on
every rank. Each rank takes its share of every batch, and gradients are summed, so the result
differs from one process only in the order of sums.
"""

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from rac_modifier.distributed.processes import ALONE, Processes
from rac_modifier.errors import RacError
from rac_modifier.measure.teacher_forcing import TokenSequence
from rac_modifier.recovery.fixed_mask import FixedMask

Batch = Sequence[TokenSequence]


@contextlib.contextmanager
def in_float32(model: Any) -> Iterator[None]:
    """Train all weights but embeddings and head, in float32, inside this context.

    Without autocast the first layer reads float32 too: norms such as Gemma's return the dtype that
    they read. Buffers are not changed: rotary frequencies would lose precision in bfloat16.
    """
    frozen = frozen_parameters(model)
    before = {name: (p.dtype, p.requires_grad) for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            continue
        is_weight = name.rpartition(".")[2] in ("weight", "bias")
        parameter.requires_grad_(id(parameter) not in frozen and is_weight)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()

    def embedded(module: torch.nn.Module, args: Any, output: Tensor) -> Tensor:
        return output if torch.is_autocast_enabled(output.device.type) else output.float()

    hook = model.get_input_embeddings().register_forward_hook(embedded)
    try:
        yield
    finally:
        hook.remove()
        for name, parameter in model.named_parameters():
            dtype, requires_grad = before[name]
            parameter.grad = None
            parameter.data = parameter.data.to(dtype)
            parameter.requires_grad_(requires_grad)


def frozen_parameters(model: Any) -> set[int]:
    """Return the ids of the parameters of embeddings, head and all outside of the decoder."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    frozen = {id(p) for end in ends for p in end.parameters()}
    decoder = {id(p) for p in model.get_decoder().parameters()}
    return frozen | ({id(p) for p in model.parameters()} - decoder)


def decoder_layers(model: torch.nn.Module, setting: str) -> list[torch.nn.Module]:
    """Return the layers that transformers marks (RacError: none, and `setting` needs them)."""
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise RacError(
            f"{type(model).__name__} has no layers that run one by one; leave {setting} out"
        )
    return layers  # type: ignore[return-value]


@contextlib.contextmanager
def recomputing(model: torch.nn.Module, enabled: bool = True) -> Iterator[None]:
    """Run each layer's forward pass again in the backward pass, with the same bits.

    transformers' own switch works in training mode alone, in which dropout is on.
    """
    layers = decoder_layers(model, "recover.activation_checkpointing") if enabled else []
    before = [vars(layer).get("forward") for layer in layers]  # an offloaded layer has its own
    for layer in layers:
        layer.forward = _twice(layer.forward)
    try:
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            del layer.forward  # the method of its class is used again
            if forward is not None:
                layer.forward = forward


def _twice(forward: Any) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return run


class Student:
    """The model in training, and this process's shards of its `parameters`."""

    def __init__(
        self,
        model: Any,
        parameters: Mapping[str, torch.nn.Parameter],
        processes: Processes = ALONE,
        masks: Mapping[str, Tensor] | None = None,
        originals: Mapping[str, torch.nn.Parameter] | None = None,
    ):
        self.model, self.parameters, self.processes = model, dict(parameters), processes
        self._masks = {n: self.shard(m).to(processes.device) for n, m in (masks or {}).items()}
        self._originals = originals or {}

    @classmethod
    def sharded(
        cls,
        model: Any,
        parameters: Mapping[str, torch.nn.Parameter],
        mask: FixedMask,
        processes: Processes,
    ) -> Self:
        """Return a sharded copy of `model` (RacError: it cannot be sharded by its layers)."""
        assert processes.device is not None
        mask.release()  # its hooks hold whole parameters; `mask` does their work
        student = copy.deepcopy(model)
        layers = decoder_layers(student, "torchrun")
        frozen = {p for p in student.parameters() if not p.requires_grad}
        mesh = init_device_mesh(processes.device.type, (processes.count,))
        for layer in layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(student.get_decoder(), mesh=mesh, ignored_params=frozen)
        for end in (student.get_input_embeddings(), student.get_output_embeddings()):
            end.to(processes.device)
        trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
        if outside := [name for name, p in trained.items() if not isinstance(p, DTensor)]:
            raise RacError(
                f"{outside[0]} is trained and not part of the decoder of {type(model).__name__}, "
                "which processes shard; start rac recover without torchrun"
            )
        return cls(student, trained, processes, mask.masks, parameters)

    def share(self, batches: Sequence[Batch]) -> list[tuple[Batch, float]]:
        """Return this rank's sequences of each batch, and their weight: 0 if it has none."""
        shares = [(b[self.processes.rank :: self.processes.count], b[:1]) for b in batches]
        # FSDP gathers layers in each forward pass, so no rank may leave one out
        return [(share, 1.0) if share else (first, 0.0) for share, first in shares]

    def local(self, tensor: Tensor) -> Tensor:
        """Return this process's shard of a parameter, gradient or moment; memory is shared."""
        return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()

    def shard(self, full: Tensor) -> Tensor:
        """Return this process's equal chunk of rows; the last chunks may be smaller or empty."""
        chunks = full.chunk(self.processes.count)  # as FSDP2 cuts its first dimension
        return chunks[self.processes.rank] if self.processes.rank < len(chunks) else full[:0]

    def like(self, name: str, shard: Tensor) -> Tensor:
        """Return a tensor like the parameter `name` from the shards of all processes."""
        # shape and stride are of the whole: the last shards may be smaller or empty
        p: Any = self.parameters[name]
        if not isinstance(p, DTensor):
            return shard.to(p.device)
        local = shard.to(p.device)
        return DTensor.from_local(
            local, p.device_mesh, p.placements, shape=p.shape, stride=p.stride()
        )

    def whole(self, name: str, shard: Tensor) -> Tensor:
        """Gather the shards on the CPU; all processes call it."""
        gathered = self.like(name, shard)
        return (gathered.full_tensor() if isinstance(gathered, DTensor) else gathered).cpu()

    @torch.no_grad()
    def mask(self) -> None:
        """Mask weights, and gradients before they are clipped: FSDP sets them without hooks."""
        for name, keep in self._masks.items():
            parameter = self.parameters[name]
            for tensor in (parameter, parameter.grad):
                if tensor is not None:
                    self.local(tensor).mul_(keep)

    @torch.no_grad()
    def put_back(self) -> None:
        """Give the model the weights of a trained copy."""
        for name, original in self._originals.items():
            original.copy_(self.whole(name, self.local(self.parameters[name])))
