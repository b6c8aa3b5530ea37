"""The compiled library: which files are accepted, and its functions called directly with sizes that do not fit."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rac_modifier.errors import RacError
from rac_modifier.kernels.cpu.library import ABI, Library, load
from rac_modifier.kernels.cpu.support import support
from tests.kernels.cpu.kernel_helpers import Packed, random_mask, run, sparse, take

OK, DAMAGED, BAD_ARGUMENT, NO_SUCH_ISA = range(4)  # of csrc/format/status.h
BF16, FP32, INT4 = 0, 1, 4  # of csrc/format/layout.h
PORTABLE = 0  # of csrc/registry.cpp


def test_importing_the_backend_is_light_and_loads_no_library():
    code = (
        "import sys, rac_modifier.kernels.choose, rac_modifier.kernels.plan\n"
        "from rac_modifier.kernels.cpu.library import load\n"
        "heavy = {'vllm', 'llmcompressor', 'compressed_tensors', 'transformers'} & set(sys.modules)\n"
        "print(heavy, load.cache_info().currsize)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split("\n")[-2:-1] == ["set() 0"], done.stderr


def test_what_is_no_library_is_a_reason(tmp_path, monkeypatch):
    broken = tmp_path / "_native.so"
    broken.write_text("not a library")
    take(broken, None, monkeypatch)
    assert load()[0] is None
    assert "does not load" in load()[1]
    assert support().isa is None
    take(broken, "avx2", monkeypatch)
    with pytest.raises(RacError, match="RAC_KERNEL=avx2: no compiled kernel"):
        support()


def shared_object(folder: Path, source: str) -> Path:
    """A library of one source file."""
    (folder / "other.cpp").write_text(source)
    run("g++", "-shared", "-fPIC", str(folder / "other.cpp"), "-o", str(folder / "_native.so"))
    return folder / "_native.so"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ('extern "C" const char* rac_pack() { return 0; }', "1 or none"),
        (f'extern "C" int rac_abi() {{ return {ABI + 1}; }}', str(ABI + 1)),
    ],
    ids=["no number", "newer"],
)
def test_a_library_of_another_version_is_refused_by_one_line(
    tmp_path, monkeypatch, best, source, found
):
    path = shared_object(tmp_path, source)
    with pytest.raises(
        RacError,
        match=rf"^_native.so was built .* \(its interface is {found}, {ABI} is needed\); reins",
    ):
        Library(path)
    take(path, None, monkeypatch)
    assert support().isa is None
    assert support().reason.startswith(
        "no compiled kernel: _native.so was built for another version of rac-modifier"
    )
    assert "\n" not in support().reason


def test_a_library_that_lacks_a_function_is_a_reason(tmp_path, monkeypatch, best):
    path = shared_object(tmp_path, f'extern "C" int rac_abi() {{ return {ABI}; }}')
    take(path, None, monkeypatch)
    assert "rac_kernels" in support().reason
    assert "reinstall rac-modifier" in support().reason


# Of the functions below, each buffer is (address, bytes).
def buffer(tensor: torch.Tensor) -> list[Any]:
    return [ctypes.c_void_p(tensor.data_ptr()), ctypes.c_int64(tensor.numel() * tensor.itemsize)]


def numbers(*values: int) -> list[Any]:
    return [ctypes.c_int64(value) for value in values]


NONE = [ctypes.c_void_p(None), ctypes.c_int64(0)]


class Native:
    """The library by ctypes alone."""

    def __init__(self, path: Path) -> None:
        self.calls = ctypes.CDLL(str(path))
        self.calls.rac_last_error.restype = ctypes.c_char_p
        self.calls.rac_packed_bytes.restype = ctypes.c_int64

    def error(self) -> str:
        return self.calls.rac_last_error().decode()


@pytest.fixture
def native(native_path: Path) -> Native:
    return Native(native_path)


@pytest.fixture
def weight(best: None) -> Packed:
    return sparse(random_mask(20, 40, 0.5), torch.bfloat16)[1]


def linear_call(weight: Packed) -> tuple[dict[str, list[Any]], Callable[[Native], int]]:
    """The buffers of a product that fits, by name, and the call with whatever they are changed to."""
    tensors = {
        "x": torch.randn(3, 40),
        "scale": torch.ones(2, 1, 16),
        "bias": torch.randn(20),
        "out": torch.zeros(3, 20),
    }
    buffers = {"data": buffer(weight.data)} | {
        name: buffer(tensor) for name, tensor in tensors.items()
    }

    def call(native: Native) -> int:
        assert len(tensors) == 4  # keeps the memory
        return native.calls.rac_sparse_linear(
            *(*buffers["data"], *numbers(20, 40)),
            *(*buffers["x"], FP32, *numbers(3)),
            *(*buffers["scale"], FP32, *numbers(1)),
            *(*buffers["bias"], FP32),
            *(*buffers["out"], PORTABLE, 1),
        )

    return buffers, call


def test_a_matmul_that_fits_and_scale_and_bias_may_be_left_out(native, weight):
    buffers, call = linear_call(weight)
    assert call(native) == OK
    buffers["bias"] = buffers["scale"] = NONE
    assert call(native) == OK


@pytest.mark.parametrize("wrong", [-4, 4, -1, -(10**6), 2**60])
@pytest.mark.parametrize("name", ["x", "scale", "bias", "out"])
def test_a_buffer_of_a_wrong_size_is_refused_by_name(native, weight, name, wrong):
    buffers, call = linear_call(weight)
    buffers[name][1].value += wrong
    assert call(native) == BAD_ARGUMENT
    assert native.error().startswith(f"{name}: {buffers[name][1].value} bytes, where [")


@pytest.mark.parametrize("name", ["x", "scale", "bias", "out"])
def test_a_buffer_without_an_address_or_not_aligned_is_refused(native, weight, name):
    buffers, call = linear_call(weight)
    address = buffers[name][0].value
    buffers[name][0].value = None
    assert call(native) == BAD_ARGUMENT
    assert native.error() == f"{name}: no address"
    buffers[name][0].value = address + 1
    assert call(native) == BAD_ARGUMENT
    assert native.error() == f"{name}: its address is no multiple of 4"


def test_packed_data_of_a_wrong_size_is_damaged(native, weight):
    buffers, call = linear_call(weight)
    for size in (-1, 0, 63, 64, 128):
        buffers["data"][1].value = size
        assert call(native) == DAMAGED
        assert "bytes" in native.error()


def test_an_instruction_set_that_is_none(native, weight):
    out = torch.zeros(40, 16)
    for isa in (-1, 9):
        status = native.calls.rac_expand_panels(
            *(*buffer(weight.data), *numbers(20, 40, 0, 1)), *(*buffer(out), FP32, isa, 1)
        )
        assert status == NO_SUCH_ISA
        assert str(isa) in native.error()


def test_panels_need_their_buffer_and_their_shape(native, weight):
    def expand(
        rows: int, columns: int, first: int, last: int, out: torch.Tensor, type: int = FP32
    ) -> int:
        return native.calls.rac_expand_panels(
            *(*buffer(weight.data), *numbers(rows, columns, first, last)),
            *(*buffer(out), type, PORTABLE, 1),
        )

    assert expand(20, 40, 0, 2, torch.zeros(40, 32)) == OK
    for shape in ((40, 31), (39, 32), (41, 32), (40, 16)):
        assert expand(20, 40, 0, 2, torch.zeros(shape)) == BAD_ARGUMENT
        assert native.error().startswith("out: ")
    # twice the bytes that bf16 needs
    assert expand(20, 40, 0, 2, torch.zeros(40, 32), BF16) == BAD_ARGUMENT
    for first, last in ((0, 3), (-1, 1), (1, 0), (2**62, 2**62)):
        assert expand(20, 40, first, last, torch.zeros(40, 32)) == BAD_ARGUMENT
    for rows, columns in ((21, 40), (20, 39), (-20, 40)):
        assert expand(rows, columns, 0, 2, torch.zeros(40, 32)) == BAD_ARGUMENT
        assert "another shape" in native.error()


def test_packing_needs_every_buffer(native):
    rows, columns = 3, 10
    values, bitmask = torch.ones(30), torch.tensor([[255, 3]] * 3, dtype=torch.uint8)

    def packed_bytes(count: int) -> int:
        return native.calls.rac_packed_bytes(
            *numbers(rows, columns, count), FP32, *NONE, *numbers(0)
        )

    data = torch.empty(packed_bytes(30), dtype=torch.uint8)

    def pack(values: list[Any], bitmask: list[Any], data: list[Any]) -> int:
        return native.calls.rac_pack_weight(
            *(*values, *bitmask, *NONE, *numbers(0)), *(*numbers(rows, columns), FP32, *data, 1)
        )

    assert pack(buffer(values), buffer(bitmask), buffer(data)) == OK
    assert pack(buffer(values), buffer(bitmask[:2]), buffer(data)) == BAD_ARGUMENT
    assert native.error() == "bitmask: 4 bytes, where 6 are needed"
    assert pack(buffer(values), NONE, buffer(data)) == BAD_ARGUMENT
    assert pack(buffer(values), buffer(bitmask), buffer(data[:-64])) == BAD_ARGUMENT
    assert pack(buffer(values)[:1] + numbers(119), buffer(bitmask), buffer(data)) == BAD_ARGUMENT
    assert native.error() == "values: 119 bytes are no whole number of values"
    fewer = torch.empty(packed_bytes(29), dtype=torch.uint8)
    assert pack(buffer(values[:-1]), buffer(bitmask), buffer(fewer)) == DAMAGED
    assert native.error() == "the bitmask has 30 bits set and there are 29 values"


def test_four_bit_values_need_their_bitmask_and_zeros(native):
    def packed_bytes(count: int, bitmask: list[Any], groups: int, type: int = INT4) -> int:
        return native.calls.rac_packed_bytes(
            *numbers(3, 16, count), type, *bitmask, *numbers(groups)
        )

    values, bitmask = torch.ones(48, dtype=torch.int8), torch.full((3, 2), 255, dtype=torch.uint8)
    zeros = torch.full((1, 2, 16), 8, dtype=torch.uint8)
    nbytes = packed_bytes(48, buffer(bitmask), 2)
    assert nbytes == 6 * 64  # header, offsets, masks, zeros, 24 bytes of codes, padding
    assert packed_bytes(48, NONE, 2) == packed_bytes(48, buffer(bitmask[:2]), 2) == -1
    for groups in (-1, 3, 4, 17, 2**62):  # 4 have no multiple of 8 columns
        assert packed_bytes(48, buffer(bitmask), groups) == -1
    assert packed_bytes(48, buffer(bitmask), 2, FP32) == -1  # floats have no zeros
    data = torch.empty(nbytes, dtype=torch.uint8)

    def pack(zeros: list[Any], groups: int, data: list[Any]) -> int:
        return native.calls.rac_pack_weight(
            *(*buffer(values), *buffer(bitmask), *zeros, *numbers(groups)),
            *(*numbers(3, 16), INT4, *data, 1),
        )

    assert pack(buffer(zeros), 2, buffer(data)) == OK
    assert pack(NONE, 2, buffer(data)) == BAD_ARGUMENT
    assert native.error() == "zeros: 0 bytes, where 32 are needed"
    assert pack(buffer(zeros), 1, buffer(data)) == BAD_ARGUMENT
    assert pack(buffer(zeros), 2, buffer(data[:-64])) == BAD_ARGUMENT
    assert native.error() == "data: 320 bytes, where 384 are needed"


def test_python_names_the_next_step_of_each_code(native_path, weight):
    library = Library(native_path)
    x, out = torch.randn(3, 40), torch.zeros(3, 20)
    with pytest.raises(
        RacError,
        match=r"sparse_linear .* x: 480 bytes, where \[3, 41\].*; pass tensors of the sizes",
    ):
        library.linear(forged_columns(weight), 20, 41, x, None, None, out, "portable")
    with pytest.raises(RacError, match=r"packed weight \[20, 40\]: .*; load the checkpoint again"):
        library.check(weight.data[:-64], 20, 40, BF16)
    assert library.value_type(weight.data) == BF16
    assert library.value_type(weight.data[:-64]) == -1
    assert library.packed_bytes(20, 40, 2**70, FP32) == -1


def forged_columns(weight: Packed) -> torch.Tensor:
    """The same data with 41 columns in its header, which needs as many bytes."""
    data = weight.data.clone()
    data[24] = 41  # behind magic (8), type (4), padding (4) and rows (8)
    return data
