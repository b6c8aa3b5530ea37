"""What speeds up a run on a CPU: oneDNN's matmuls, matrices by blocks, and memory that is kept."""

import ctypes
import mmap
import os
import subprocess
import sys
from platform import libc_ver

import pytest
import torch

from rac_modifier import platform
from rac_modifier.platform import (
    FasterLinears,
    add_matmul_,
    expect_growth,
    keep_freed_memory,
    matmul,
    padded_size,
    return_freed_memory,
    with_zero_rows,
)
from tests.pruning.pruning_reference import (
    assert_near,
    dampened,
    gaussian,
    random_problem,
    solve_tolerance,
)

glibc = pytest.mark.skipif(libc_ver()[0] != "glibc", reason="glibc alone has these settings")
choose = platform._is_amd_with_avx512.__wrapped__


@pytest.fixture
def calls(monkeypatch) -> list[tuple[int, ...]]:
    """Gives all float32 products to oneDNN, whatever the processor; the shapes of those that it
    computed."""
    shapes, inner = list[tuple[int, ...]](), platform._linear_by_onednn

    def noting(x, weight, bias=None):
        shapes.append((*x.shape, weight.shape[0]))
        return inner(x, weight, bias)

    monkeypatch.setattr(platform, "_is_amd_with_avx512", lambda: True)
    monkeypatch.setattr(platform, "_LEAST_WORK", 100)
    monkeypatch.setattr(platform, "_LEAST_ROWS", 50)
    monkeypatch.setattr(platform, "_linear_by_onednn", noting)
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
    [
        ("rows", "columns"),
        ("columns", "part"),
        ("part", "part of columns"),
        ("part of columns", "rows"),
    ],
)
def test_matmuls_are_those_of_torch_in_every_layout(of_a, of_b, calls, monkeypatch):
    monkeypatch.setattr(platform, "_CHUNK", 20)
    a, b, out = of_layout(of_a, 50, 40, 1), of_layout(of_b, 40, 30, 2), of_layout("part", 50, 30, 3)
    terms, before = 40 * torch.finfo(torch.float32).eps, out.double()
    exact = a.double() @ b.double()
    assert_near(matmul(a, b), exact, terms)
    assert add_matmul_(out, a, b, alpha=-2.0).data_ptr() == out.data_ptr()
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
    monkeypatch.setattr(platform, "_is_amd_with_avx512", choose)
    devices = [platform.onednn_is_faster(torch.device(name)) for name in ("cpu", "meta")]
    assert devices == [chosen, False]
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert not choose()
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # as in torch 2.10
    assert not choose()


def test_torch_still_has_the_operator_and_names_the_processor():
    """The operator that torch's compiler uses for linear layers; the name is in the table of
    capabilities."""
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


SIZES = [1, 16, 17, 130]


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(platform, "BLOCK", 16)
    monkeypatch.setattr(platform, "_FACTOR_CHUNK", 40)
    monkeypatch.setattr(platform, "_SMALL_TRIANGLE", 5)


def problem(d: int, dampening: float = 0.01) -> torch.Tensor:
    return dampened(random_problem(3, d, 2 * d)[1], dampening)


def garbled(matrix: torch.Tensor) -> torch.Tensor:
    """In float32, with other numbers above the diagonal: only the lower triangle is read."""
    return matrix.float().tril() + torch.full(matrix.shape, 7.0).triu(1)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("d", SIZES)
def test_factor_inverse_and_solve_by_blocks(d):
    exact, right = problem(d), gaussian(5, d).T
    tolerance = solve_tolerance(exact, torch.float32)
    matrix = garbled(exact)
    lower = platform.cholesky_(matrix)
    assert lower.data_ptr() == matrix.data_ptr()
    assert torch.equal(lower, lower.tril())
    rounding = solve_tolerance(torch.eye(1), torch.float32) * d
    assert_near(lower.double() @ lower.double().T, exact, rounding)
    matrix = garbled(exact)
    inverse = platform.inverse_(matrix)
    assert inverse.data_ptr() == matrix.data_ptr()
    assert torch.equal(inverse, inverse.T)
    assert_near(inverse, torch.linalg.inv(exact), tolerance)
    before = right.clone()
    solution = platform.cholesky_solve(right, torch.linalg.cholesky(exact).float())
    assert torch.equal(right, before)
    assert_near(solution, torch.linalg.solve(exact, right.double()), tolerance)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("d", SIZES)
def test_a_factor_by_matmuls_in_bfloat16_is_near(d):
    exact = problem(d, 0.2)
    plain, rounded = (platform.cholesky_(exact.float(), bf16=b).double() for b in (False, True))
    assert torch.equal(plain, rounded) == (
        d <= 32
    )  # a second block has the first alone to its left
    tolerance = solve_tolerance(torch.eye(1), torch.bfloat16) * d**0.5
    assert_near(rounded @ rounded.T, exact, tolerance)


@pytest.mark.usefixtures("small_blocks")
def test_what_all_inputs_share_is_not_rounded():
    d = 512
    sizes = torch.rand(d, generator=torch.Generator().manual_seed(0)) + 0.5
    exact = sizes * sizes[:, None] + 0.05 * torch.diag(sizes**2)
    lower = platform.cholesky_(exact.clone(), bf16=True)
    assert_near(lower @ lower.T, exact, 1e-3)
    apart = torch.eye(d + 16)
    apart[16:, 16:] = exact  # now the first block has nothing of it
    assert platform.cholesky_(apart, bf16=True) is None


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("dtype", "margin"), [(torch.float32, 50.0), (torch.bfloat16, 1.0)])
@pytest.mark.parametrize("d", SIZES)
def test_a_solve_in_place_takes_a_factor_with_inverted_corners(d, dtype, margin):
    exact, right = problem(d), gaussian(5, d).T.contiguous().to(dtype)
    expected = torch.linalg.solve(exact, right.double())
    lower = platform.invert_corners_(torch.linalg.cholesky(exact).float())
    solution = platform.solve_with_corners_(right, lower.to(dtype))
    assert solution.data_ptr() == right.data_ptr()
    assert_near(solution, expected, solve_tolerance(exact, dtype, margin))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("at", [0, 20, 69])
def test_a_matrix_that_is_not_positive_definite_has_none(at):
    matrix = problem(70).float()
    matrix[at, at] = -1.0
    assert platform.cholesky_(matrix.clone()) is None
    assert platform.inverse_(matrix.clone()) is None


def test_the_lower_triangle_is_mirrored():
    matrix = gaussian(50, 50)
    expected = matrix.tril() + matrix.tril(-1).T
    assert torch.equal(platform.mirror_lower_(matrix, 16), expected)


# 20 times 64 MiB, written and freed: as many bytes of pages each time where they are new.
BYTES = 20 * (64 << 20)
CODE = """
import ctypes, resource, sys, threading
import torch
from rac_modifier.platform import keep_freed_memory
print(keep_freed_memory() if sys.argv[1] == "keep" else None)
assert ctypes.CDLL(None).prctl(41, 1, 0, 0, 0) == 0  # no huge pages: they hide faults
def work():
    for _ in range(20):
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
def test_freed_blocks_are_used_again_unless_the_user_decides(how, variables, set_by_us) -> None:
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


class CLibrary:
    """A C library that notes what it is told."""

    def __init__(self, glibc: bool = True):
        self.told: list[tuple[int, int]] = []
        if glibc:
            self.gnu_get_libc_version = None

    def mallopt(self, option: int, value: int) -> int:
        self.told.append((option, value))
        return 1


SET_BY_USERS = [
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TRIM_THRESHOLD_",
    "MALLOC_ARENA_MAX",
    "GLIBC_TUNABLES",
]


@pytest.mark.parametrize("variable", [None, *SET_BY_USERS])
@pytest.mark.parametrize("glibc", [True, False])
def test_what_is_set(monkeypatch: pytest.MonkeyPatch, glibc: bool, variable: str | None) -> None:
    """M_MMAP_THRESHOLD, M_TRIM_THRESHOLD and M_ARENA_MAX of glibc's malloc.h."""
    library = CLibrary(glibc)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    for name in SET_BY_USERS:
        monkeypatch.delenv(name, raising=False)
    if variable is not None:
        monkeypatch.setenv(variable, "")
    assert keep_freed_memory() == (glibc and variable is None)
    expected = {-3: 256 << 20, -1: 1 << 30, -8: 1} if glibc and variable is None else {}
    assert dict(library.told) == expected


def test_memory_is_given_back_where_a_process_outgrows_its_forecast(monkeypatch) -> None:
    library, resident = CLibrary(), [10**6]

    def trim(pad: int) -> None:
        library.told.append((0, resident[0]))
        resident[0] = 1700

    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr(library, "malloc_trim", trim, raising=False)
    monkeypatch.setattr(platform, "_resident_limit", None)
    monkeypatch.setattr(platform, "resident_bytes", lambda: resident[0])
    return_freed_memory()  # without a forecast
    resident[0] = 1000
    expect_growth(800)
    for grown in (1800, 1801, 1850, 1851, 1900):
        resident[0] = grown
        return_freed_memory()
    assert [grown for _, grown in library.told] == [1801, 1851], "the limit rises by 50"


def test_resident_memory_is_read_from_the_system() -> None:
    before = platform.resident_bytes()
    with mmap.mmap(-1, 256 << 20) as block:  # new pages: malloc could hand out resident ones
        block.write(bytes(256 << 20))
        assert platform.resident_bytes() - before > 200 << 20
