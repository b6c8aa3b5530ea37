"""The compiled library: finding it, and its functions with torch tensors. Each tensor is passed with its size in bytes."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_char_p, c_int32, c_int64, c_void_p
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from rac_modifier.errors import RacError

ABI = 7  # of csrc/library.cpp; raised with every change of the functions
X86_ISAS, ARM_ISAS = ("avx2", "avxvnni", "avx512", "amx"), ("neon", "dotprod", "i8mm", "sve")
ISAS = ("portable", *X86_ISAS, *ARM_ISAS)  # in the order of the library's numbers
BYTE_ISAS = (
    "avxvnni",
    "avx512",
    "amx",
    "dotprod",
    "i8mm",
    "sve",
)  # they multiply bytes of x; the others 16 bits
TYPES = {torch.bfloat16: 0, torch.float32: 1}  # of x, bias and results
VALUE_TYPES = {**TYPES, torch.int8: 2}
INT8 = VALUE_TYPES[torch.int8]
# int8 without masks; int8 whose values take four bits, with masks and without; with masks, as planes of bits; and without
# masks those that take three and two bits
DENSE8, INT4, DENSE4, PLANES4, DENSE3, DENSE2 = 3, 4, 5, 6, 7, 8
BITS = {INT4: 4, DENSE4: 4, PLANES4: 4, DENSE3: 3, DENSE2: 2}  # of types whose values are codes
DENSE_TYPES = {8: DENSE8, 4: DENSE4, 3: DENSE3, 2: DENSE2}  # without masks, by bits
_NUMBER = {isa: number for number, isa in enumerate(ISAS)}
_REINSTALL = "install a C++ compiler and reinstall rac-modifier (pip install --force-reinstall --no-deps --no-cache-dir)"
_BUFFER: list[object] = [c_void_p, c_int64]  # address and bytes
# name: (result, arguments)
_SIGNATURES: dict[str, tuple[object, list[object]]] = {
    "rac_best_isa": (c_int32, []),
    "rac_runs": (c_int32, [c_int32]),
    "rac_compiler": (c_char_p, []),
    "rac_last_error": (c_char_p, []),
    "rac_sparse_int4_type": (c_int32, [c_int32]),
    "rac_packed_bytes": (c_int64, [c_int64, c_int64, c_int64, c_int32, *_BUFFER, c_int64]),
    "rac_pack_weight": (
        c_int32,
        [
            *(*_BUFFER, *_BUFFER, *_BUFFER, c_int64),  # values, bitmask, zeros, groups of zeros
            *(
                c_int64,
                c_int64,
                c_int32,
                *_BUFFER,
                c_int32,
            ),  # rows, columns, type, packed weight, threads
        ],
    ),
    "rac_check_weight": (c_int32, [*_BUFFER, c_int64, c_int64, c_int32]),
    "rac_value_type": (c_int32, _BUFFER),
    "rac_activation_bits": (c_int32, [*_BUFFER, c_int32]),
    "rac_set_activation_bits": (c_int32, [*_BUFFER, c_int32]),
    "rac_expand_panels": (
        c_int32,
        [
            *(*_BUFFER, c_int64, c_int64),  # the packed weight, rows, columns
            *(c_int64, c_int64),  # panels
            *(*_BUFFER, c_int32, c_int32, c_int32),  # out, its type, instruction set, threads
        ],
    ),
    "rac_sparse_linear": (
        c_int32,
        [
            *(*_BUFFER, c_int64, c_int64),  # the packed weight, rows, columns
            *(*_BUFFER, c_int32, c_int64),  # x, its type, its rows
            *(*_BUFFER, c_int32, c_int64),  # scale, its type, groups
            *(*_BUFFER, c_int32),  # bias, its type
            *(*_BUFFER, c_int32, c_int32),  # out, instruction set, threads
        ],
    ),
    "rac_register_operator": (c_int32, [c_void_p, c_int32]),
    "rac_use_operator": (c_int32, [c_int32, c_int64]),  # instruction set, most lines
}
# The next step by the code that a function returns, which is a Status of csrc/status.h.
_NEXT_STEPS = {
    1: "load the checkpoint again, or copy it again if that does not help",
    2: "pass tensors of the sizes and dtypes that this weight needs",
    3: "set RAC_KERNEL to an instruction set of this processor, or unset it",
    4: "free memory, or use smaller batches",
}


class Library:
    """The functions of one compiled library. Callers pass contiguous CPU tensors; a refusal becomes a RacError."""

    def __init__(self, path: Path) -> None:
        """Load a library.

        Raises:
            OSError: the file is no library.
            AttributeError: it lacks a function.
            RacError: it was built for another version of this package.
        """
        self._calls = ctypes.CDLL(str(path))
        found = self._calls.rac_abi() if hasattr(self._calls, "rac_abi") else "1 or none"
        if found != ABI:
            raise RacError(
                f"{path.name} was built for another version of rac-modifier (its interface is {found}, {ABI} is needed); "
                "reinstall rac-modifier, which builds it again"
            )
        for name, (result, arguments) in _SIGNATURES.items():
            call = getattr(self._calls, name)
            call.restype, call.argtypes = result, arguments
        self.best = ISAS[self._calls.rac_best_isa()]
        self.compiler: str = self._calls.rac_compiler().decode()

    @property
    def runs(self) -> tuple[str, ...]:
        """The instruction sets that this machine runs. The last one is the best, but `sve` only where its vectors are long."""
        return tuple(isa for isa in ISAS if self._calls.rac_runs(_NUMBER[isa]))

    def sparse_int4_type(self, isa: str) -> int:
        """The type in which an instruction set multiplies sparse 4-bit values fastest: `INT4` or `PLANES4`.

        `PLANES4` needs scales, and codes of zero, that are one per row or in groups of a multiple of 32 columns.
        """
        return self._calls.rac_sparse_int4_type(_NUMBER[isa])

    def packed_bytes(
        self,
        rows: int,
        columns: int,
        nonzeros: int,
        value_type: int,
        bitmask: Tensor | None = None,
        zero_groups: int = 0,
    ) -> int:
        """Bytes of a packed weight of a type (`VALUE_TYPES`, `DENSE8`, ...); -1 for impossible sizes.

        `INT4` and `PLANES4` need the bitmask. `zero_groups`: groups of columns whose code of zero is given, of `DENSE3` and
        `DENSE2` at least 1.
        """
        limit = 1 << 62
        if not all(-limit < size < limit for size in (rows, columns, nonzeros)):
            return -1
        return self._calls.rac_packed_bytes(
            rows, columns, nonzeros, value_type, *_buffer(bitmask), zero_groups
        )

    def pack(
        self,
        values: Tensor,
        bitmask: Tensor | None,
        zeros: Tensor | None,
        rows: int,
        columns: int,
        value_type: int,
        data: Tensor,
    ) -> None:
        """Fill `data`, uint8 [packed_bytes]; no bitmask without masks. `zeros` of codes: uint8 [panels, groups, 16]."""
        status = self._calls.rac_pack_weight(
            *(
                *_buffer(values),
                *_buffer(bitmask),
                *_buffer(zeros),
                0 if zeros is None else zeros.shape[1],
            ),
            *(rows, columns, value_type, *_buffer(data), torch.get_num_threads()),
        )
        self._raise_if(status, f"weight [{rows}, {columns}]: cannot be packed")

    def check(self, data: Tensor, rows: int, columns: int, value_type: int) -> None:
        """Check everything in packed data that a kernel relies on."""
        status = self._calls.rac_check_weight(*_buffer(data), rows, columns, value_type)
        self._raise_if(status, f"packed weight [{rows}, {columns}]")

    def value_type(self, data: Tensor) -> int:
        """The type of the values, from the header; -1 where it is damaged."""
        return self._calls.rac_value_type(*_buffer(data))

    def activation_bits(self, data: Tensor, isa: str) -> int:
        """Bits that x is rounded to in products with packed integers; 0 for floats, -1 where the header is damaged."""
        return self._calls.rac_activation_bits(*_buffer(data), _NUMBER[isa])

    def set_activation_bits(self, data: Tensor, bits: int) -> None:
        """Have x rounded to `bits`, 8 or 16, in products with these packed integers."""
        status = self._calls.rac_set_activation_bits(*_buffer(data), bits)
        self._raise_if(status, f"activations in {bits} bits")

    def expand(
        self, data: Tensor, rows: int, columns: int, first: int, last: int, out: Tensor, isa: str
    ) -> None:
        """Panels [first, last) of 16 rows into `out` [columns, 16 (last - first)]: the rows transposed, without scale."""
        status = self._calls.rac_expand_panels(
            *(*_buffer(data), rows, columns, first, last),
            *(*_buffer(out), TYPES[out.dtype], _NUMBER[isa], torch.get_num_threads()),
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
        status = self._calls.rac_sparse_linear(
            *(*_buffer(data), rows, columns),
            *(*_buffer(x), TYPES[x.dtype], x.shape[0]),
            *(
                *_buffer(scale),
                *((1, 1) if scale is None else (TYPES[scale.dtype], scale.shape[1])),
            ),
            *(*_buffer(bias), 0 if bias is None else TYPES[bias.dtype]),
            *(*_buffer(out), _NUMBER[isa], torch.get_num_threads()),
        )
        self._raise_if(status, f"sparse_linear with a weight [{rows}, {columns}]")

    @property
    def handle(self) -> int:
        """The same number for the same loaded library."""
        return self._calls._handle

    def register_operator(self, functions: Sequence[int | None]) -> None:
        """Give torch the operator in C++; `functions` are those of its C interface, by address (native_operator.py)."""
        addresses = (c_void_p * len(functions))(*functions)
        self._raise_if(
            self._calls.rac_register_operator(addresses, len(functions)), "the operator in C++"
        )

    def use_operator(self, isa: str | None, lines: int) -> None:
        """Let it multiply up to `lines` rows of x with `isa`; None: nothing."""
        self._calls.rac_use_operator(-1 if isa is None else _NUMBER[isa], lines)

    def _raise_if(self, status: int, what: str) -> None:
        if status:
            raise RacError(
                f"{what}: {self._calls.rac_last_error().decode()}; {_NEXT_STEPS[status]}"
            )


def _buffer(tensor: Tensor | None) -> tuple[int | None, int]:
    """Address and bytes."""
    return (None, 0) if tensor is None else (tensor.data_ptr(), tensor.numel() * tensor.itemsize)


def built_libraries() -> list[Path]:
    """The libraries that were built when the package was installed."""
    return sorted(Path(__file__).parent.glob("_native*.so"))


@lru_cache(maxsize=1)
def load() -> tuple[Library | None, str]:
    """The library, or None and the reason."""
    found = built_libraries()
    if not found:
        return (
            None,
            f"no compiled kernel: it was not built when rac-modifier was installed; {_REINSTALL}",
        )
    try:
        return Library(found[0]), ""
    except RacError as error:
        return None, f"no compiled kernel: {error}"
    except (OSError, AttributeError) as error:
        return None, f"no compiled kernel: {found[0].name} does not load ({error}); {_REINSTALL}"
