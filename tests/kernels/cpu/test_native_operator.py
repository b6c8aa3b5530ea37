"""The operator in C++: what it multiplies itself, what it leaves to Python, and what it owns."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from rac_modifier.errors import RacError
from rac_modifier.kernels.cpu import library, native_operator, operator
from rac_modifier.kernels.cpu.packed import pack_dense, pack_scale
from rac_modifier.kernels.cpu.support import forget, library_and_isa
from tests.kernels.cpu.kernel_helpers import random_mask, sparse
from tests.kernels.cpu.rounded import quantize_groups, quantize_rows

FLOATS = [torch.bfloat16, torch.float32]


@pytest.fixture
def active(best):
    """Torch has the operator of the library in use."""
    library_and_isa()
    if sys.platform != "linux" and native_operator.state.refused is not None:
        pytest.skip(native_operator.state.refused)
    assert (
        native_operator.state.refused is None
    )  # every torch that pyproject.toml allows has the interface
    if not native_operator.state.active:
        pytest.skip("this process has given torch the operator of another library")


@pytest.fixture
def in_python(monkeypatch):
    """Counts the products that are started from Python."""
    counted, linear = [], library.Library.linear

    def count(self, *arguments):
        counted.append(arguments)
        linear(self, *arguments)

    monkeypatch.setattr(library.Library, "linear", count)
    return counted


def dense4() -> tuple[torch.Tensor, torch.Tensor]:
    values, scale = quantize_groups(torch.randn(40, 96), 32)
    return pack_dense(values, 4), pack_scale(scale, 32, narrow=True)


def dense8() -> tuple[torch.Tensor, torch.Tensor]:
    values, scale = quantize_rows(torch.randn(40, 96))
    return pack_dense(values), pack_scale(scale)


def floats() -> tuple[torch.Tensor, None]:
    return sparse(random_mask(40, 96, 0.5), torch.bfloat16)[1].data, None


@pytest.mark.parametrize("weight", [dense4, dense8, floats])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_same_bits_as_the_operator_in_python_and_without_it(active, in_python, weight, dtype):
    data, scale = weight()
    for shape in ((1,), (8,), (2, 3), (1, 1, 2), ()):
        x = torch.randn(*shape, 96).to(dtype)
        for bias in (None, torch.randn(40), torch.randn(40).bfloat16()):
            found = operator.sparse_linear(x, data, 40, 96, bias, scale)
            assert in_python == []
            expected = torch.ops.rac_modifier.sparse_linear(x, data, 40, 96, bias, scale)
            assert len(in_python) == 1
            in_python.clear()
            assert found.dtype == dtype
            assert found.shape == (*shape, 40)
            assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "x",
    [torch.randn(9, 96), torch.randn(96, 2).t(), torch.randn(2, 192)[:, ::2], torch.randn(0, 96)],
    ids=["nine rows", "transposed", "every other", "none"],
)
def test_what_is_not_plain_is_left_to_python(active, in_python, x):
    data, scale = dense8()
    found = operator.sparse_linear(x, data, 40, 96, None, scale)
    assert len(in_python) == 1
    assert torch.equal(found, torch.ops.rac_modifier.sparse_linear(x, data, 40, 96, None, scale))


def test_errors_are_those_of_python(active):
    data, scale = dense8()
    x = torch.randn(2, 96)
    for arguments, says in (
        ((x.half(), data, 40, 96), "x: torch.float16"),
        ((x, data, 40, 95), "does not end in the weight's 95 columns"),
        ((x, data[:-64], 40, 96, None, scale), "where its header needs"),
        ((x, data, 40, 96, torch.randn(39), scale), "bias"),
        ((x, data, 40, 96, None, scale[:, :, :8]), "scale"),
        ((x, data, 40, 96, None, None), "scale"),
    ):
        with pytest.raises(RacError, match=says):
            operator.sparse_linear(*arguments)


def resident() -> int:
    """Bytes of this process."""
    return int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1]) << 10


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_it_keeps_no_tensor(active):
    """Neither what it is given nor what it returns, with and without the optional ones."""
    data, scale = dense8()

    def many(count: int) -> None:
        for i in range(count):
            big = torch.ones(1 << 16)  # 256 KiB behind a view of 8 rows
            operator.sparse_linear(
                big[: 8 * 96].view(8, 96), data, 40, 96, big[:40] if i % 2 else None, scale
            )

    many(20)
    before = resident()
    many(400)
    assert resident() - before < 400 * (1 << 18) // 4


def test_opcheck_and_a_compiled_graph(active):
    data, scale = dense4()
    torch.library.opcheck(
        torch.ops.rac_modifier.native_linear,
        (torch.randn(2, 96), data, 40, 96, torch.randn(40), scale),
    )
    step = torch.compile(
        lambda x: operator.sparse_linear(x * 2, data, 40, 96, None, scale) + 1,
        fullgraph=True,
        backend="aot_eager",
        dynamic=True,
    )
    for m in (2, 8, 9, 30):
        x = torch.randn(m, 96)
        assert torch.equal(
            step(x), torch.ops.rac_modifier.sparse_linear(x * 2, data, 40, 96, None, scale) + 1
        )


@pytest.mark.slow
def test_a_graph_in_cpp_calls_it_without_python(active):
    """With Inductor's cpp_wrapper, which docs/serving.md describes."""
    data, scale = dense4()

    def step(x):
        return operator.sparse_linear(x * 2, data, 40, 96, None, scale) + 1

    compiled = torch.compile(step, fullgraph=True, dynamic=True, options={"cpp_wrapper": True})
    inputs = [torch.randn(m, 96) for m in (2, 3, 9)]
    with torch.no_grad():
        compiled(inputs[0])
        called = []
        sys.setprofile(
            lambda frame, event, _: (
                called.append(frame.f_code.co_filename) if event == "call" else None
            )
        )
        found = [compiled(x) for x in inputs]
        sys.setprofile(None)
    assert all(torch.equal(y, step(x)) for x, y in zip(inputs, found, strict=True))
    assert called
    assert not [name for name in called if name.endswith("torch/_ops.py")]


def test_without_it_all_is_in_python(active, in_python):
    data, scale = dense8()
    x = torch.randn(2, 96)
    expected = operator.sparse_linear(x, data, 40, 96, None, scale)
    native_operator.deactivate()
    for op in (operator.sparse_linear, torch.ops.rac_modifier.native_linear):
        assert torch.equal(op(x, data, 40, 96, None, scale), expected)
    assert len(in_python) == 2
    forget()
    library_and_isa()
    assert native_operator.state.active


def test_a_torch_without_the_interface_is_a_reason(active, monkeypatch):
    monkeypatch.setattr(
        native_operator, "FUNCTIONS", (*native_operator.FUNCTIONS, "torch_has_no_such_function")
    )
    reason = native_operator._register(library_and_isa()[0])
    assert reason is not None
    assert "has no stable C interface" in reason


def test_the_library_refuses_a_table_that_does_not_fit(active):
    used = library_and_isa()[0]
    with pytest.raises(RacError, match="17 functions of torch, where 18 are needed"):
        used.register_operator([1] * 17)
    with pytest.raises(RacError, match="function 3 of torch is missing"):
        used.register_operator([1, 1, 1, None] + [1] * 14)
