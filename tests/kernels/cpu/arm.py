"""The library as ARM processors run it: cross-compiled, run by qemu-user, and called through a pipe."""

from __future__ import annotations

import ctypes
import os
import shutil
import struct
import subprocess
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pytest

from rac_modifier.kernels.cpu import library, support
from tests.kernels.cpu.kernel_helpers import CSRC, FLAGS, HERE, run, setup_library

COMPILER, EMULATOR, X86_EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64", "qemu-x86_64"
TOOLS = CSRC.parent / "build" / "arm-tools"  # where scripts/arm_tools.sh unpacks them without root
os.environ["PATH"] += f"{os.pathsep}{TOOLS / 'bin'}"
SYSROOT = next(
    (str(path) for path in TOOLS.glob("root/usr/aarch64-linux-gnu")), "/usr/aarch64-linux-gnu"
)
_WRITE = (
    "rac_pack_weight",
    "rac_set_activation_bits",
    "rac_expand_panels",
    "rac_sparse_linear",
)  # to their last buffer
# A processor for each instruction set that has it and none above it: an instruction of those would stop the test.
PROCESSORS = {"neon": "cortex-a72", "i8mm": "max,sve=off"}


def need_tool(tool: str) -> None:
    """Skip the test if the machine does not have it."""
    if shutil.which(tool) is None:
        pytest.skip(f"no {tool} on this machine: `make arm-tools` installs it on Debian and Ubuntu")


def arm_library(folder: Path) -> Path:
    """The library for ARM; skips the test without the cross compiler and the emulator that it needs."""
    for tool in (COMPILER, EMULATOR):
        need_tool(tool)
    link = f"{COMPILER} -shared"
    return setup_library(folder, CC=COMPILER, CXX=COMPILER, LDSHARED=link, LDCXXSHARED=link)


def arm_program(folder: Path, source: str, shared: Path, compiler: str = COMPILER) -> Path:
    """A C++ file of this folder, linked to the library for ARM, or to that of another compiler."""
    out = folder / Path(source).stem
    run(
        compiler,
        *FLAGS,
        "-O1",
        str(HERE / source),
        str(shared),
        f"-Wl,-rpath,{shared.parent}",
        "-fopenmp",
        "-o",
        str(out),
    )
    return out


def emulated(processor: str, program: Path, *arguments: str) -> list[str]:
    """The command that runs a program as this processor would."""
    return [EMULATOR, "-cpu", processor, "-L", SYSROOT, str(program), *arguments]


class ArmLibrary(library.Library):
    """The functions of the library on an emulated processor."""

    def __init__(self, server: Path, processor: str) -> None:
        self._calls: Any = Calls(server, processor)
        assert self._calls.rac_abi() == library.ABI
        self._ask()

    def close(self) -> None:
        self._calls.process.communicate()


class Calls:
    """What ctypes.CDLL is for the library of this machine."""

    def __init__(self, server: Path, processor: str) -> None:
        self.process = subprocess.Popen(
            emulated(processor, server), stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def __getattr__(self, name: str) -> Any:
        return partial(self._call, name)

    def _call(self, name: str, *values: Any) -> Any:
        result, types = (ctypes.c_int32, []) if name == "rac_abi" else library.signature(name)
        message, out = [_counted(name.encode())], (None, 0)
        for i, (kind, value) in enumerate(zip(types, values, strict=True)):
            if kind is not ctypes.c_void_p:
                message.append(b"n" + struct.pack("<q", value))
            elif value is None:
                message.append(b"z")
            else:
                out = (value, values[i + 1])
                message.append(b"b" + _counted(ctypes.string_at(*out)))
        self.process.stdin.write(b"".join(message))
        self.process.stdin.flush()
        answer = (
            self._read() if result is ctypes.c_char_p else struct.unpack("<q", self._exactly(8))[0]
        )
        left = self._read()
        if out[0] is not None and name in _WRITE:
            ctypes.memmove(out[0], left, out[1])
        return answer

    def _read(self) -> bytes:
        return self._exactly(struct.unpack("<q", self._exactly(8))[0])

    def _exactly(self, size: int) -> bytes:
        found = self.process.stdout.read(size)
        assert len(found) == size, f"the emulated processor stopped with {self.process.wait()}"
        return found


def _counted(data: bytes) -> bytes:
    return struct.pack("<q", len(data)) + data


def take_arm(arm: ArmLibrary, isa: str, patch: pytest.MonkeyPatch) -> None:
    """Make the package use this library and this RAC_KERNEL."""
    patch.setattr(library, "load", lru_cache(lambda: (arm, "")))
    patch.setenv("RAC_KERNEL", isa)
    support.forget()
