"""Evaluation mode, the accelerator, and the early end of a forward pass of a model."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from loguru import logger
from torch import Tensor
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
