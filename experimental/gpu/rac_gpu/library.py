"""The kernels for a group on a device: compiled for it, loaded, and ready to be launched. Once per process."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from rac_gpu import nvrtc
from rac_gpu.driver import Module
from rac_gpu.programs import EXPAND, all_programs
from rac_modifier.errors import RacError

SOURCE = "decode.cu"


@dataclass(frozen=True)
class Device:
    """A GPU: its number for torch, compute capability, and multiprocessors."""

    index: int
    capability: tuple[int, int]
    processors: int

    @classmethod
    def of(cls, device: torch.device | int) -> Device:
        """Ask torch for the numbers of a GPU."""
        found = torch.cuda.get_device_properties(device)
        index = device if isinstance(device, int) else device.index
        return cls(index, (found.major, found.minor), found.multi_processor_count)

    @property
    def architecture(self) -> str:
        """Return such as sm_90."""
        return f"sm_{self.capability[0]}{self.capability[1]}"


_loaded: dict[tuple[int, int], Module | str] = {}


def current_device() -> Device | None:
    """Return the GPU that torch uses now; None without one."""
    return Device.of(torch.cuda.current_device()) if torch.cuda.is_available() else None


def prepare(device: Device, group: int) -> str | None:
    """Compile and load the kernels on a device, before any graph is captured; return the reason if it cannot be."""
    key = (device.index, group)
    if key not in _loaded:
        try:
            kernels = {program.name: program.shared_bytes for program in all_programs(group)}
            code, _ = compiled(device.architecture, group)
            _loaded[key] = Module(code, kernels | {EXPAND: 0}, device.index)
        except RacError as error:
            _loaded[key] = str(error)
    found = _loaded[key]
    return found if isinstance(found, str) else None


def module(device: Device, group: int) -> Module:
    """Return what `prepare` loaded.

    Raises:
        RacError: it did not.
    """
    found = _loaded.get((device.index, group))
    if not isinstance(found, Module):
        raise RacError(
            f"no GPU kernels are loaded on device {device.index} ({found}); pack the weight in this process"
        )
    return found


def compiled(architecture: str, group: int, *options: str) -> tuple[bytes, str]:
    """Compile the kernels: machine code, and the compiler's log.

    Raises:
        RacError: there is no compiler, or it cannot compile for this architecture.
    """
    chosen = [f"--gpu-architecture={architecture}", "--std=c++17", f"--define-macro=GROUP={group}"]
    return nvrtc.load().build(read_sources(), SOURCE, [*chosen, *options])


@lru_cache(maxsize=1)
def read_sources() -> dict[str, str]:
    """Read the CUDA C++ sources, package data in source/: text by file name."""
    return {path.name: path.read_text() for path in (Path(__file__).parent / "source").iterdir()}
