"""The kernels of a layout on a device: compiled for it, loaded, and ready to be launched. Once per process."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rac_gpu import cache, nvrtc
from rac_gpu.driver import Module, TryAgainError
from rac_gpu.layout import Layout
from rac_gpu.programs import all_programs
from rac_gpu.sources import read_sources
from rac_modifier.errors import RacError


@dataclass(frozen=True)
class Device:
    """A GPU: its number for torch, compute capability, multiprocessors, and bytes of L2."""

    index: int
    capability: tuple[int, int]
    processors: int
    cache: int = 0

    @property
    def architecture(self) -> str:
        """Such as sm_90."""
        return f"sm_{self.capability[0]}{self.capability[1]}"


_loaded: dict[tuple[int, Layout], Module | str] = {}


def current_device() -> Device | None:
    """The GPU that torch uses now; None without one."""
    if not torch.cuda.is_available():
        return None
    index = torch.cuda.current_device()
    found = torch.cuda.get_device_properties(index)
    return Device(
        index,
        (found.major, found.minor),
        found.multi_processor_count,
        found.L2_cache_size,
    )


def prepare(device: Device, layout: Layout) -> str | None:
    """Compile and load what a layout needs on a device, before any graph is captured; the reason if it cannot be.

    A reason that may pass, such as too little memory, is not kept: the next layer tries again.
    """
    key = (device.index, layout)
    if key not in _loaded:
        try:
            kernels = {program.name: program.shared_bytes for program in all_programs(layout)}
            _loaded[key] = Module(compiled(device.architecture, layout), kernels, device.index)
        except TryAgainError as error:
            return str(error)
        except RacError as error:
            _loaded[key] = str(error)
    found = _loaded[key]
    return found if isinstance(found, str) else None


def module(device: Device, layout: Layout) -> Module:
    """What `prepare` loaded.

    Raises:
        RacError: it did not.
    """
    found = _loaded.get((device.index, layout))
    if not isinstance(found, Module):
        reason = f" ({found})" if found else ""
        raise RacError(
            f"no GPU kernels are loaded on device {device.index}{reason}; pack the weight in this process"
        )
    return found


def compiled(architecture: str, layout: Layout) -> bytes:
    """Machine code of a layout's kernels, from the cache or the compiler.

    Raises:
        RacError: there is no compiler, or it cannot compile for this architecture.
    """
    sources, compiler = read_sources(), nvrtc.load()
    options = compile_options(architecture, layout)
    key = cache.key_of(
        repr(compiler.version),
        *options,
        layout.source,
        *(text for item in sources.items() for text in item),
    )
    return cache.cached(key, lambda: compiler.build(sources, layout.source, options)[0])


def compile_options(architecture: str, layout: Layout) -> list[str]:
    """The compiler's options."""
    macros = [f"--define-macro={macro}" for macro in layout.defines]
    return [f"--gpu-architecture={architecture}", "--std=c++17", *macros]


def forget() -> None:
    """Load anew at the next use. For tests."""
    _loaded.clear()
