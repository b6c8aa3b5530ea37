"""The compiled library and its functions, with torch tensors; each is passed with its bytes."""

import ctypes
from collections.abc import Sequence
from ctypes import c_char_p, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from rac_modifier.errors import RacError

ABI = 10  # of csrc/library.cpp; raised with every change of the functions
FLOAT_TYPES = {torch.bfloat16: 0, torch.float32: 1}  # of x, bias, scales and results
PANEL = 16  # rows
MOST_GROUP = 512  # columns that share a scale of the weight, where a row has several, or of x


@dataclass(frozen=True)
class PackedType:
    """How values are packed: a `Type` of csrc/format/layout.h.

    `dtype` of the values that are passed, `bits` that each takes. `masked`: zeros are left out.
    Groups have a multiple of `unit` columns.
    """

    number: int
    dtype: torch.dtype
    bits: int
    masked: bool
    unit: int = 1


PACKED_TYPES = (
    PackedType(0, torch.bfloat16, 16, masked=True),
    PackedType(1, torch.float32, 32, masked=True),
    PackedType(2, torch.int8, 8, masked=True, unit=4),
    PackedType(3, torch.int8, 8, masked=False, unit=4),
    PackedType(4, torch.int8, 4, masked=True, unit=8),
    PackedType(5, torch.int8, 4, masked=False, unit=8),
    PackedType(6, torch.int8, 3, masked=False, unit=32),
    PackedType(7, torch.int8, 2, masked=False, unit=32),
)
_REINSTALL = (
    "install a C++ compiler and reinstall rac-modifier "
    "(pip install --force-reinstall --no-deps --no-cache-dir)"
)
# The result, then the arguments: i int32, q int64, s text, p address, B address and bytes.
_SIGNATURES = {
    "rac_kernels": "s",
    "rac_compiler": "s",
    "rac_last_error": "s",
    "rac_packed_bytes": "q qqqi B q",  # rows, columns, values, type; bitmask; groups of zeros
    "rac_pack_weight": "i BBBq qqi Bi",  # values, bitmask, zeros, groups; shape, type; data
    "rac_check_weight": "i B qqi",
    "rac_value_type": "i B",
    "rac_set_activation_bits": "i B i",
    "rac_expand_panels": "i Bqq qq B ii",  # data, shape; panels; out; kernel, threads
    # data, shape; x, type, tokens; scale, type, groups; bias, type; out; kernel, threads
    "rac_sparse_linear": "i Bqq Biq Biq Bi B ii",
    "rac_add_panels": "i Bqq Bq Bq BB ii",  # data, shape; x, tokens; panels, count; scale, out
    "rac_register_operator": "i pi",
    "rac_use_operator": "i iq",  # kernel, most tokens
}
_C_TYPES: dict[str, list[type]] = {
    "i": [c_int32],
    "q": [c_int64],
    "s": [c_char_p],
    "p": [c_void_p],
    "B": [c_void_p, c_int64],
}
# The next step by the code that a function returns, which is a Status of csrc/format/status.h.
_NEXT_STEPS = {
    1: "load the checkpoint again, or copy it again if that does not help",
    2: "pass tensors of the sizes and dtypes that this weight needs",
    3: "set RAC_KERNEL to an instruction set of this processor, or unset it",
    4: "free memory, or use smaller batches",
}


@dataclass(frozen=True)
class Kernel:
    """What the library says about the kernel of an instruction set."""

    number: int
    name: str
    title: str
    runs: bool
    multiplies_bytes: bool  # x may be rounded to 8 bits, not only to 16
    floats: int  # most tokens of the kernel, by type of the values; -1: any
    int8: int
    int4: int


class Library:
    """The functions of a compiled library, for contiguous CPU tensors; they raise RacError."""

    def __init__(self, path: Path) -> None:
        """Load a library (OSError, AttributeError, RacError: another file, or another version)."""
        self._calls = ctypes.CDLL(str(path))
        abi = self._calls.rac_abi() if hasattr(self._calls, "rac_abi") else "1 or none"
        if abi != ABI:
            raise RacError(
                f"{path.name} was built for another version of rac-modifier (its interface is "
                f"{abi}, {ABI} is needed); reinstall rac-modifier, which builds it again"
            )
        for name, text in _SIGNATURES.items():
            call, (result, *arguments) = getattr(self._calls, name), list(text.replace(" ", ""))
            call.restype = _C_TYPES[result][0]
            call.argtypes = [kind for letter in arguments for kind in _C_TYPES[letter]]
        self.compiler: str = self._calls.rac_compiler().decode()
        self.kernels: dict[str, Kernel] = {}
        for line in self._calls.rac_kernels().decode().splitlines():
            number, name, title, *numbers = line.split()
            runs, multiplies_bytes, *crossovers = map(int, numbers)
            flags = (runs == 1, multiplies_bytes == 1)
            self.kernels[name] = Kernel(int(number), name, title, *flags, *crossovers)

    @property
    def runs(self) -> tuple[str, ...]:
        """Return the kernels that this machine runs; the last is the best."""
        return tuple(kernel.name for kernel in self.kernels.values() if kernel.runs)

    def pack(
        self,
        values: Tensor,
        bitmask: Tensor | None,
        zeros: Tensor | None,
        shape: tuple[int, int],
        value_type: int,
    ) -> Tensor:
        """Return a packed weight, uint8 [bytes]. `zeros` of codes: uint8 [panels, groups, 16]."""
        groups = 0 if zeros is None else zeros.shape[1]
        sizes = (*shape, values.numel(), value_type, *_buffer(bitmask), groups)
        nbytes = self._calls.rac_packed_bytes(*sizes)
        if nbytes < 0:
            raise RacError(
                f"{values.numel()} values for a weight {list(shape)}: impossible; it is damaged"
            )
        data = torch.empty(nbytes, dtype=torch.uint8)
        status = self._calls.rac_pack_weight(
            *(*_buffer(values), *_buffer(bitmask), *_buffer(zeros), groups),
            *(*shape, value_type, *_buffer(data), torch.get_num_threads()),
        )
        self._raise_if(status, f"weight {list(shape)}: cannot be packed")
        self.check(data, *shape, value_type)
        return data

    def check(self, data: Tensor, rows: int, columns: int, value_type: int) -> None:
        """Check everything in packed data that a kernel relies on."""
        status = self._calls.rac_check_weight(*_buffer(data), rows, columns, value_type)
        self._raise_if(status, f"packed weight [{rows}, {columns}]")

    def value_type(self, data: Tensor) -> int:
        """Return the type of the values, from the header; -1 where it is damaged."""
        return self._calls.rac_value_type(*_buffer(data))

    def set_activation_bits(self, data: Tensor, bits: int) -> None:
        """Have x rounded to `bits`, 8 or 16, in matmuls with these packed integers."""
        status = self._calls.rac_set_activation_bits(*_buffer(data), bits)
        self._raise_if(status, f"activations in {bits} bits")

    def expand(
        self, data: Tensor, rows: int, columns: int, first: int, last: int, out: Tensor, isa: str
    ) -> None:
        """Write panels [first, last) of 16 rows to `out` float32 [columns, 16 (last - first)]."""
        status = self._calls.rac_expand_panels(
            *(*_buffer(data), rows, columns, first, last, *_buffer(out)),
            *(self.kernels[isa].number, torch.get_num_threads()),
        )
        self._raise_if(status, f"packed weight [{rows}, {columns}]: cannot be expanded")

    def linear(
        self,
        data: Tensor,
        rows: int,
        columns: int,
        x: Tensor,
        scale: Tensor | None,
        bias: Tensor | None,
        out: Tensor,
        isa: str,
    ) -> None:
        """Fill `out` [M, rows] with x [M, columns] W^T + bias; `scale` is [panels, groups, 16]."""
        of_scale = (1, 1) if scale is None else (FLOAT_TYPES[scale.dtype], scale.shape[1])
        status = self._calls.rac_sparse_linear(
            *(*_buffer(data), rows, columns, *_buffer(x), FLOAT_TYPES[x.dtype], x.shape[0]),
            *(
                *_buffer(scale),
                *of_scale,
                *_buffer(bias),
                0 if bias is None else FLOAT_TYPES[bias.dtype],
            ),
            *(*_buffer(out), self.kernels[isa].number, torch.get_num_threads()),
        )
        self._raise_if(status, f"sparse_linear with a weight [{rows}, {columns}]")

    def add_panels(
        self, data: Tensor, x: Tensor, panels: Tensor, scale: Tensor, out: Tensor, isa: str
    ) -> None:
        """Add to `out` [M, rows] what x [M, columns] makes with the panels of each token.

        All are float32 but `panels`, int64 [M, count], distinct. `scale`: [panels, 1, 16].
        """
        shape = (out.shape[1], x.shape[1])
        status = self._calls.rac_add_panels(
            *(*_buffer(data), *shape, *_buffer(x), x.shape[0], *_buffer(panels), panels.shape[1]),
            *(*_buffer(scale), *_buffer(out), self.kernels[isa].number, torch.get_num_threads()),
        )
        self._raise_if(status, f"panels of a weight {list(shape)}")

    @property
    def handle(self) -> int:
        """Return the same number for the same loaded library."""
        return self._calls._handle

    def register_operator(self, functions: Sequence[int | None]) -> None:
        """Give torch the C++ operator; `functions`: addresses of torch's (support.py)."""
        addresses = (c_void_p * len(functions))(*functions)
        status = self._calls.rac_register_operator(addresses, len(functions))
        self._raise_if(status, "the C++ operator")

    def use_operator(self, isa: str | None, tokens: int) -> None:
        """Let the C++ operator multiply up to `tokens` tokens with `isa`; None: none."""
        self._calls.rac_use_operator(-1 if isa is None else self.kernels[isa].number, tokens)

    def _raise_if(self, status: int, action: str) -> None:
        if status:
            reason = self._calls.rac_last_error().decode()
            raise RacError(f"{action}: {reason}; {_NEXT_STEPS[status]}")


def _buffer(tensor: Tensor | None) -> tuple[int | None, int]:
    return (None, 0) if tensor is None else (tensor.data_ptr(), tensor.numel() * tensor.itemsize)


def built_libraries() -> list[Path]:
    """Return the libraries that were built when the package was installed."""
    return sorted(Path(__file__).parent.glob("_native_kernels*.so"))


@lru_cache(maxsize=1)
def load() -> tuple[Library | None, str]:
    """Return the library, or None and the reason."""
    paths = built_libraries()
    if not paths:
        reason = f"it was not built when rac-modifier was installed; {_REINSTALL}"
    else:
        try:
            return Library(paths[0]), ""
        except RacError as error:
            reason = str(error)
        except (OSError, AttributeError) as error:
            reason = f"{paths[0].name} does not load ({error}); {_REINSTALL}"
    return None, f"no compiled kernel: {reason}"
