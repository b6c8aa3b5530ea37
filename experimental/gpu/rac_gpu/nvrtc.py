"""NVIDIA's run-time compiler, called through its C interface: CUDA C++ to machine code, without a GPU or a driver."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from rac_modifier.errors import RacError

INSTALL = "pip install nvidia-cuda-nvrtc"
_NAME = "libnvrtc.so.13"


class Compiler:
    """A loaded NVRTC library."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def build(
        self, sources: Mapping[str, str], name: str, options: Sequence[str]
    ) -> tuple[bytes, str]:
        """Machine code (a cubin) of the file `name`, which may include the others, and the compiler's log.

        Raises:
            RacError: it does not compile, with the log.
        """
        headers = [other for other in sources if other.endswith(".h")]
        program = ctypes.c_void_p()
        self._call(
            "nvrtcCreateProgram",
            ctypes.byref(program),
            sources[name].encode(),
            name.encode(),
            len(headers),
            _strings([sources[header] for header in headers]),
            _strings(headers),
        )
        try:
            status = self._library.nvrtcCompileProgram(program, len(options), _strings(options))
            log = (
                self._text("nvrtcGetProgramLogSize", "nvrtcGetProgramLog", program)
                .rstrip(b"\0")
                .decode(errors="replace")
            )
            if status:
                raise RacError(f"{name}: {self._error(status)} with {list(options)}: {log[:2000]}")
            return self._text("nvrtcGetCUBINSize", "nvrtcGetCUBIN", program), log
        finally:
            self._library.nvrtcDestroyProgram(ctypes.byref(program))

    def _text(self, size: str, get: str, program: ctypes.c_void_p) -> bytes:
        length = ctypes.c_size_t()
        self._call(size, program, ctypes.byref(length))
        buffer = ctypes.create_string_buffer(length.value)
        self._call(get, program, buffer)
        return buffer.raw

    def _call(self, function: str, *arguments: object) -> None:
        status = getattr(self._library, function)(*arguments)
        if status:
            raise RacError(f"{function}: {self._error(status)}; reinstall NVRTC: {INSTALL}")

    def _error(self, status: int) -> str:
        describe = self._library.nvrtcGetErrorString
        describe.restype = ctypes.c_char_p
        return describe(status).decode()


@lru_cache(maxsize=1)
def load() -> Compiler:
    """The compiler of this environment: that of nvidia-cuda-nvrtc, else the system's.

    Raises:
        RacError: there is none, or it does not load.
    """
    folders = (Path(entry) / "nvidia/cu13/lib" for entry in sys.path if entry)
    found = next((path for path in folders if (path / _NAME).is_file()), None)
    try:
        if found is not None:  # NVRTC opens its other library by name only
            for builtins in found.glob("libnvrtc-builtins.so*"):
                ctypes.CDLL(str(builtins), ctypes.RTLD_GLOBAL)
        return Compiler(ctypes.CDLL(_NAME if found is None else str(found / _NAME)))
    except OSError as error:
        raise RacError(f"NVRTC is not installed ({error}); {INSTALL}") from error


def _strings(texts: Sequence[str]) -> ctypes.Array[ctypes.c_char_p]:
    return (ctypes.c_char_p * len(texts))(*(text.encode() for text in texts))
