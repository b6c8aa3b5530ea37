"""The one place that lists the backends and chooses between them."""

from __future__ import annotations

import torch

from rac_modifier.kernels import cpu, cuda
from rac_modifier.kernels.cpu.examine import Found, examine_library
from rac_modifier.kernels.interface import Backend, Decision, Layer, stay_dense

# By device type, as torch names it. A new backend is a folder beside cpu/ and an entry here.
BACKENDS: dict[str, Backend] = {"cpu": cpu, "cuda": cuda}


def choose(layer: Layer, device: str) -> tuple[Decision, Backend | None]:
    """How a layer runs on a device type such as "cpu", and the backend that runs it; None where it stays dense."""
    backend = BACKENDS.get(device)
    if backend is None:
        return no_backend(device, layer.served), None
    decision = backend.can_run(layer)
    return decision, backend if decision.sparse else None


def has_backend(device: str) -> bool:
    """Whether layers may run sparse on a device type: there is a backend, and on a GPU it was asked for.

    Raises:
        RacError: RAC_GPU_KERNELS is none of on, all and off.
    """
    return device in BACKENDS and (device != "cuda" or cuda.requested())


def no_backend(device: str, served: torch.dtype) -> Decision:
    """The decision for a device type for which `has_backend` is False."""
    if device in BACKENDS:
        return stay_dense(cuda.NOT_REQUESTED, served)
    return stay_dense(f"there is no sparse kernel for {device} yet", served)


def examine_backends() -> list[Found]:
    """What is compiled, loads and runs here, for reports to the user; `choose` does not need it."""
    return examine_library()
