"""What speeds up a run on a CPU: oneDNN's matmuls, matrices by blocks, and memory that is kept."""

import ctypes
import os
import subprocess
import sys
from platform import libc_ver
from types import SimpleNamespace

import pytest
import torch

from rac_modifier.runtime import cpu_tuning
from rac_modifier.runtime.cpu_tuning import (
    FasterLinears,
    add_matmul_,
    expect_growth,
    matmul,
    padded_size,
    return_freed_memory,
    with_zero_rows,
)
from tests.pruning.pruning_reference import assert_near, gaussian

glibc = pytest.mark.skipif(libc_ver()[0] != "glibc", reason="glibc alone has these settings")
choose = cpu_tuning._is_amd_with_avx512.__wrapped__


@pytest.fixture
def calls(monkeypatch) -> list[tuple[int, ...]]:
    """Gives all float32 products to oneDNN, whatever the processor."""
    shapes, inner = list[tuple[int, ...]](), cpu_tuning._linear_by_onednn

    def noting(x, weight, bias=None):
        shapes.append((*x.shape, weight.shape[0]))
        return inner(x, weight, bias)

    monkeypatch.setattr(cpu_tuning, "_is_amd_with_avx512", lambda: True)
    monkeypatch.setattr(cpu_tuning, "_LEAST_WORK", 100)
    monkeypatch.setattr(cpu_tuning, "_LEAST_ROWS", 50)
    monkeypatch.setattr(cpu_tuning, "_linear_by_onednn", noting)
    return shapes


def of_layout(kind: str, rows: int, columns: int, seed: int) -> torch.Tensor:
    """A matrix that lies row by row, column by column, or as a part of a larger one."""
    if kind == "columns":
        return gaussian(columns, rows, seed=seed).T
    if kind == "part":
        return gaussian(rows + 3, columns + 5, seed=seed)[2 : rows + 2, 1 : columns + 1]
    if kind == "part of columns":
        return gaussian(columns + 3, rows + 5, seed=seed)[2 : columns + 2, 1 : rows + 1].T
    return gaussian(rows, columns, seed=seed)


@pytest.mark.parametrize(
    ("of_a", "of_b"),
    [("rows", "columns"), ("columns", "part"), ("part", "part of columns")],
)
def test_matmuls_are_those_of_torch_in_every_layout(of_a, of_b, calls):
    a, b, out = of_layout(of_a, 50, 40, 1), of_layout(of_b, 40, 30, 2), of_layout("part", 50, 30, 3)
    terms, before = 40 * torch.finfo(torch.float32).eps, out.double()
    exact = a.double() @ b.double()
    assert_near(matmul(a, b), exact, terms)
    assert add_matmul_(out, a, b, alpha=-2.0, chunk=20).data_ptr() == out.data_ptr()
    assert_near(out, before - 2 * exact, terms)
    assert calls == [(50, 40, 30), (20, 40, 30), (20, 40, 30), (10, 40, 30)]


@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers_are_computed_so_while_the_mode_is_in_place(bias, calls):
    layer, x = torch.nn.Linear(40, 30, bias=bias), gaussian(2, 25, 40)
    with torch.no_grad():
        expected = layer.double()(x.double())
        with FasterLinears():
            actual = layer.float()(x)
        assert calls == [(52, 40, 30)], "50 tokens, and two of zeros"
        assert actual.shape == (2, 25, 30)
        layer(x)
    with FasterLinears():
        assert layer(x).requires_grad, "training keeps torch's own"
        with torch.no_grad():
            layer.bfloat16()(x.bfloat16())
    assert len(calls) == 1
    assert_near(actual, expected, 40 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize(
    ("has", "chosen"),
    [
        ({"cpu_name": "AMD EPYC", "avx512_f": True}, True),
        ({"cpu_name": "AMD Ryzen 7", "avx2": True}, False),
        ({"cpu_name": "Intel(R) Xeon(R)", "avx512_f": True}, False),
        ({}, False),
    ],
)
def test_it_is_chosen_by_processor(has, chosen, monkeypatch):
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    assert choose() == chosen
    monkeypatch.setattr(cpu_tuning, "_is_amd_with_avx512", choose)
    devices = [cpu_tuning.onednn_is_faster(torch.device(name)) for name in ("cpu", "meta")]
    assert devices == [chosen, False]
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert not choose()
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # as in torch 2.10
    assert not choose()


def test_torch_still_has_the_operator_and_names_the_processor():
    """The operator that torch's compiler uses for linear layers."""
    schema = str(torch.ops.mkldnn._linear_pointwise.default._schema)
    assert schema.startswith("mkldnn::_linear_pointwise(Tensor X, Tensor W, Tensor? B, str attr, ")
    capabilities = torch.cpu.get_capabilities()
    assert capabilities["architecture"] != "x86_64" or isinstance(capabilities["cpu_name"], str)


def test_numbers_of_tokens_become_a_few_sizes():
    """Those that are a multiple of 512 up to 8,192 stay as they are."""
    sizes = [padded_size(count) for count in range(1, 4097)]
    assert all(count <= size <= 1.125 * count for count, size in enumerate(sizes, 1))
    assert len(set(sizes[2047:])) == 9
    assert all(padded_size(count) == count for count in (*range(1, 17), *range(512, 8193, 512)))
    x = torch.randn(1000, 3)
    assert with_zero_rows(x[:896]).data_ptr() == x.data_ptr()
    longer = with_zero_rows(x)
    assert torch.equal(longer[:1000], x)
    assert longer.shape == (1024, 3)
    assert not longer[1000:].any()


# 8 times 64 MiB, written and freed: as many bytes of pages each time where they are new.
BYTES = 8 * (64 << 20)
CODE = """
import ctypes, resource, sys, threading
import torch
from rac_modifier.runtime.cpu_tuning import keep_freed_memory
print(keep_freed_memory() if sys.argv[1] == "keep" else None)
assert ctypes.CDLL(None).prctl(41, 1, 0, 0, 0) == 0  # no huge pages: they hide faults
def work():
    for _ in range(8):
        torch.ones(16 << 20)
def faults(run):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    run()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
def in_thread():
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
work()
print(faults(work), faults(in_thread))
"""


@glibc
@pytest.mark.parametrize(
    ("how", "variables", "set_by_us"),
    [
        ("leave", {}, "None"),
        ("keep", {}, "True"),
        ("keep", {"MALLOC_TRIM_THRESHOLD_": "131072"}, "False"),
    ],
)
def test_freed_blocks_are_used_again_unless_the_user_decides(how, variables, set_by_us):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    command = [sys.executable, "-c", CODE, how]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    said, *faults = process.stdout.split()[-3:]
    assert said == set_by_us
    pages = BYTES / os.sysconf("SC_PAGE_SIZE")
    if how == "leave":
        assert min(map(int, faults)) > pages / 4, "glibc keeps such blocks by itself now"
    if said == "True":
        assert max(map(int, faults)) < pages / 40


def test_memory_is_given_back_where_a_process_outgrows_its_forecast(monkeypatch):
    trimmed, resident = [], [10**6]

    def trim(pad: int) -> None:
        trimmed.append(resident[0])
        resident[0] = 1700

    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(malloc_trim=trim))
    monkeypatch.setattr(cpu_tuning, "_resident_limit", None)
    monkeypatch.setattr(cpu_tuning, "resident_bytes", lambda: resident[0])
    return_freed_memory()  # without a forecast
    resident[0] = 1000
    expect_growth(800)
    for grown in (1800, 1801, 1850, 1851, 1900):
        resident[0] = grown
        return_freed_memory()
    assert trimmed == [1801, 1851], "the limit rises by 50"
