"""The memory of one training step, counted: the step runs on tensors without data, and what is alive is added up.

Nothing of an architecture is assumed: the model's own forward pass, the loss and the backward pass run with torch's fake tensors,
which have shapes and no memory. So what attention, experts, norms and checkpointing keep is what they would keep.
"""

from __future__ import annotations

import copy
import weakref
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rac_modifier.model_tools import evaluating
from rac_modifier.recovery.hidden_states import input_of_head, output_head
from rac_modifier.recovery.loss import head_kl
from rac_modifier.recovery.recomputing import recomputing
from rac_modifier.recovery.trained_parameters import frozen_parameters


def step_bytes(
    model: Any,
    rows: int,
    length: int,
    predicted: int,
    *,
    autocast: torch.dtype | None,
    checkpointing: bool,
    micro_batches: int = 1,
    keep_gradients: bool = True,
) -> int:
    """Bytes that one step takes at its peak beside weights and moments: activations, gradients, and the loss.

    Operators are those of the CPU; others keep about as much. From fake tensors transformers cannot tell that attention needs no
    mask, and makes one: about 8 bytes x length^2 are counted that a run does not take.

    Args:
        model: a causal LM; it is not changed.
        rows, length: of the batch.
        predicted: its completion tokens, which the loss is taken on.
        autocast: dtype of products.
        checkpointing: whether activations of layers are computed again.
        micro_batches: of the step; in a second one the gradients of the first are there from the start.
        keep_gradients: False: they are not counted once a parameter has its own.

    Raises:
        RuntimeError: of torch; shapes depend on data, as those of routed experts.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), evaluating(model):
        student = _without_data(model)
        if not keep_gradients:
            for weight in student.parameters():
                if weight.requires_grad:
                    weight.register_post_accumulate_grad_hook(_drop_gradient)
        ids = torch.zeros(rows, length - 1, dtype=torch.long)
        head: Any = output_head(student)
        states = head.weight.new_empty(predicted, head.weight.shape[1])
        with _LiveBytes() as live, recomputing(student, checkpointing):
            for _ in range(micro_batches):
                with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
                    hidden = input_of_head(student, ids).flatten(0, 1)[:predicted].clone()
                head_kl(hidden, states, head).backward()
                del hidden
    return live.peak


def _without_data(model: Any) -> Any:
    """A copy of the model as it is trained, whose parameters are fake; buffers are those of the model."""
    frozen = frozen_parameters(model)
    copies: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    for p in model.parameters():
        trained = p.is_floating_point() and id(p) not in frozen
        dtype = torch.float32 if trained else p.dtype
        copies[id(p)] = torch.nn.Parameter(torch.empty(p.shape, dtype=dtype), requires_grad=trained)
    return copy.deepcopy(model, copies)


def _drop_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None


class _LiveBytes(TorchDispatchMode):
    """The bytes of all storages that operators made and that are still alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, tuple[Any, int]] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        given = {
            id(t.untyped_storage())
            for t in tree_leaves((args, kwargs))
            if isinstance(t, torch.Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if id(storage) not in given and id(storage) not in self._known:
                    self._known[id(storage)] = (
                        weakref.ref(storage, self._gone(id(storage))),
                        storage.nbytes(),
                    )
                    self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        return result

    def _gone(self, key: int) -> Any:
        def forget(_: Any) -> None:
            self.now -= self._known.pop(key)[1]

        return forget
