"""Evaluation mode, the accelerator, the early end of a forward pass, and memory counted ahead."""

import contextlib
import copy
import logging
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from loguru import logger
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from rac_modifier.errors import RacError

_OTHER_DEVICE = (
    'use a device with more memory, or load the model with device_map="auto", which stays as it is'
)


class _StopForward(Exception):  # noqa: N818 - control flow, not an error
    """Raised by a hook that has its activations, to skip the rest of a forward pass."""


def input_of(module: torch.nn.Module, forward: Callable[[], object]) -> Tensor | None:
    """Run `forward` up to `module`; return what that is called with, None where it is not."""
    inputs: list[Tensor] = []

    def stop(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs.append(args[0])
        raise _StopForward

    hook = module.register_forward_pre_hook(stop)
    try:
        with contextlib.suppress(_StopForward):
            forward()
    finally:
        hook.remove()
    return inputs[0] if inputs else None


@contextlib.contextmanager
def evaluating(*models: Any) -> Iterator[None]:
    """Put models into evaluation mode, and afterwards back into their own."""
    before = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for model, training in zip(models, before, strict=True):
            model.train(training)


def accelerator() -> torch.device | None:
    """Return the accelerator of this process; None without any."""
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None


def main_device() -> torch.device:
    """Return the device of this process: its accelerator with its number, or the CPU."""
    device = accelerator()
    if device is None:
        return torch.device("cpu")
    return torch.device(device.type, torch.accelerator.current_device_index())


def is_placed(model: PreTrainedModel) -> bool:
    """Return whether the weights are placed: by device_map, offloading, or on another device."""
    from compressed_tensors.offload.cache import OffloadCache  # takes a second

    return (
        hasattr(model, "hf_device_map")
        or any(isinstance(module._parameters, OffloadCache) for module in model.modules())
        or any(p.device.type != "cpu" for p in model.parameters())
    )


def devices_of(model: PreTrainedModel) -> set[str]:
    """Return where the weights are kept, such as "cpu", "cuda:1" or "disk"."""
    from compressed_tensors.offload.cache.base import OffloadCache

    stores = [module._parameters for module in model.modules()]
    cached = {str(s.offload_device) for s in stores if isinstance(s, OffloadCache) and len(s)}
    plain = (p for s in stores if not isinstance(s, OffloadCache) for p in s.values())
    return cached | {str(p.device) for p in plain if p is not None}


@contextlib.contextmanager
def on_accelerator(model: PreTrainedModel, next_step: str = _OTHER_DEVICE) -> Iterator[None]:
    """Move a model that is not placed to the accelerator, and afterwards back to the CPU."""
    device = accelerator()
    if device is None or is_placed(model):
        yield
        return
    check_fits(model, device, next_step)
    logger.info(f"moving the model to {device}")
    model.to(device)  # type: ignore[arg-type]
    try:
        yield
    finally:
        model.to("cpu")  # type: ignore[arg-type]


@contextlib.contextmanager
def streamed_to_accelerator(model: PreTrainedModel) -> Iterator[None]:
    """Compute on the accelerator with weights in shared memory, copied when a module runs."""
    device = accelerator()
    if device is None or is_placed(model):
        yield
        return
    from compressed_tensors.offload import remove_dispatch, set_onload_device

    set_onload_device(model, device)
    try:
        yield
    finally:
        remove_dispatch(model)


@contextlib.contextmanager
def onloaded_once(model: PreTrainedModel) -> Iterator[None]:
    """Run each module with a quantization scheme on one copy of its weights.

    compressed-tensors rounds the weight that it reads, and torch reads it again: where weights are
    onloaded, that is another copy, which is not rounded.
    """
    from compressed_tensors.offload import disable_offloading
    from compressed_tensors.utils import patch_attr

    def once(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with disable_offloading():
            return forward(*args, **kwargs)

    with contextlib.ExitStack() as stack:
        for module in model.modules():
            if getattr(module, "quantization_scheme", None) is not None:
                stack.enter_context(patch_attr(module, "forward", partial(once, module.forward)))
        yield


def check_fits(
    model: PreTrainedModel, device: torch.device, next_step: str = _OTHER_DEVICE
) -> None:
    """Refuse to move a model to a device without memory for it (RacError; ends in `next_step`).

    Compressed weights are counted dense: the first forward pass decompresses them.
    """
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    weights = sum(t.numel() * t.element_size() for t in tensors.values())
    for module in model.modules():
        if getattr(module, "quantization_status", None) == "compressed":
            compressed = sum(p.numel() * p.element_size() for p in module.parameters(False))
            values = getattr(module, "in_features", 0) * getattr(module, "out_features", 0)
            weights += max(values * model.dtype.itemsize - compressed, 0)
    free = free_bytes(device)
    # A forward pass needs 5 % of the weights as well, and at least 1 GB (compressed-tensors).
    if free is not None and weights + max(weights // 20, 10**9) > free:
        raise RacError(
            f"the weights of the model take {weights / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB "
            f"are free on {device}, also for a forward pass: {next_step}"
        )


def free_bytes(device: torch.device) -> int | None:
    """Return the bytes that can still be allocated on a device; None where that is not known."""
    if device.type == "cpu":
        import psutil

        return int(psutil.virtual_memory().available)
    if device.type == "cuda":
        reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + reserve  # PyTorch's, unused
    return None


_WIDTH = 512  # inputs of the narrower of two rehearsed problems


class LiveBytes(TorchDispatchMode):
    """Count the bytes of all storages that operators create while they live: `now` and `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._storages: dict[int, tuple[Any, int]] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = {
            id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)
        }
        outputs = [result] if isinstance(result, Tensor) else tree_leaves(result)
        for tensor in outputs:
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key = id(storage)
                if key not in self._storages and key not in inputs:
                    reference = weakref.ref(storage, partial(self._forget, key))
                    self._storages[key] = reference, storage.nbytes()
                    self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        return result

    def _forget(self, key: int, _: object) -> None:
        self.now -= self._storages.pop(key)[1]


def widened_peak(rehearse: Callable[[int], int], columns: int, multiple: int = 1) -> int:
    """Return the peak bytes of `rehearse(columns)`, from two smaller widths: a w^2 + b w."""
    narrow = max(_WIDTH // multiple, 1) * multiple
    if columns <= 2 * narrow:
        return rehearse(columns)
    small, large = rehearse(narrow), rehearse(2 * narrow)
    a = (large - 2 * small) / (2 * narrow**2)
    b = (4 * small - large) / (2 * narrow)
    return int(a * columns**2 + b * columns)


@contextlib.contextmanager
def without_data(model: Any, **options: Any) -> Iterator[Any]:
    """Yield a copy of a transformers model with fake tensors, like all new ones meanwhile."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True  # it logs a traceback before the error is raised
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            config = copy.deepcopy(model.config)
            yield type(model)._from_config(config, dtype=model.dtype, **options).eval()
    finally:
        log.disabled = before
