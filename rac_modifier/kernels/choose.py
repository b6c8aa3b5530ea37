"""Choose the backend of a layer: the CPU's, or an entry point of an installed package."""

from __future__ import annotations

from functools import lru_cache
from importlib.metadata import entry_points
from typing import cast

from rac_modifier.kernels import cpu
from rac_modifier.kernels.interface import Backend, Decision, Layer, stay_dense

GROUP = "rac_modifier.kernel_backends"
"""Entry points: the name is a device type of torch, the value a backend module."""
BACKENDS: dict[str, Backend] = {"cpu": cpu}


def choose(layer: Layer, device: str) -> tuple[Decision, Backend | None]:
    """Decide how a layer runs on a device type such as "cpu"; backend None: dense."""
    backend = BACKENDS.get(device) or _from_entry_point(device)
    if isinstance(backend, str):
        return stay_dense(backend, layer.served), None
    decision = backend.can_run(layer)
    return decision, backend if decision.sparse else None


@lru_cache(maxsize=16)
def _from_entry_point(device: str) -> Backend | str:
    """Import the backend that an installed package names for a device type."""
    for point in entry_points(group=GROUP, name=device):
        package = point.dist.name if point.dist is not None else point.value
        try:
            return cast(Backend, point.load())
        except Exception as error:  # a foreign package: the layer runs dense
            return f"the backend of {package} cannot be imported ({type(error).__name__}: {error})"
    return f"there is no sparse kernel for {device}"
