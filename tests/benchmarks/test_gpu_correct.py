"""The checks that run on a GPU, here on the fake one: what they launch, and that they notice a wrong result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rac_modifier.errors import RacError
from rac_modifier.kernels.cuda import operator
from rac_modifier.kernels.cuda.cards import card_of
from rac_modifier.kernels.cuda.layout import ALL
from rac_modifier.kernels.cuda.library import Device
from rac_modifier.kernels.cuda.programs import all_programs
from tests.kernels.cuda import fake_cusparselt
from tests.kernels.cuda import fake_gpu as fakes
from tests.kernels.cuda.fake_gpu import FakeDriver, fake_gpu

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
BF16_SUMS = torch.backends.cuda.matmul


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch):
    """The module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_correct

    return gpu_correct


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch):
    with fake_gpu(monkeypatch) as fake:
        yield fake


def launched(gpu: FakeDriver) -> set[tuple[str, int, str]]:
    return {(launch.layout.title, launch.layout.group, launch.name) for launch in gpu.launches}


EVERY = {(layout.title, layout.group, each.name) for layout in ALL for each in all_programs(layout)}


def test_programs_that_are_right_pass(benchmark, gpu, monkeypatch):
    """In the emulator, in which tests/kernels/cuda/ has those of all layouts."""
    names = ["bf16", "int8 g64", "unstructured fp8", "unstructured int4 g128"]
    monkeypatch.setattr(benchmark, "FORMATS", {name: benchmark.FORMATS[name] for name in names})
    budget = benchmark.Budget(3600)
    rows = list(benchmark.check_programs("cpu", 24, 136, budget))
    assert [row["program"] for row in rows] == [
        launch.name for launch in gpu.launches[::2]
    ]  # each twice
    assert [row["format"] for row in rows] == [
        name for name in names for _ in range(4 if "un" in name else 12)
    ]
    assert all(0 < row["error"] <= 1 for row in rows)
    assert budget.left_out == []


@pytest.mark.parametrize("name", ["h100", "a100", "4090", "l4", "b200"])
def test_every_program_is_launched_on_each_card_whatever_it_would_choose(
    benchmark, monkeypatch, name
):
    """Launches do nothing here."""
    card = card_of(name)
    monkeypatch.setattr(fakes, "emulate_pointers", lambda *arguments: "")
    monkeypatch.setattr(
        benchmark, "error_of", lambda what, linear, x, *others: float(linear(x)[0, 0]) * 0
    )
    rows, columns = benchmark.PROGRAMS_SHAPE[0], 136
    with fake_gpu(monkeypatch, Device(0, card.capability, card.processors, card.reported)) as gpu:
        found = list(benchmark.check_programs("cpu", rows, columns, benchmark.Budget(3600)))
    assert launched(gpu) == EVERY
    assert len(found) == len(gpu.launches) == len(EVERY) == 11 * 12 + 9 * 4
    for launch in gpu.launches:  # more than one block along tokens, and along rows
        if "expand" not in launch.name:
            assert launch.grid[0] == 2
            assert launch.grid[1] >= 2


def test_each_ring_goes_round_more_than_once_with_the_weight_that_a_gpu_gets(benchmark):
    columns = benchmark.PROGRAMS_SHAPE[1]
    for layout in (layout for layout in ALL if not layout.any_pattern):
        for each in all_programs(layout)[:-1]:
            chunk = each.units * (
                each.row_tiles * layout.unit_bytes + each.token_tiles * 8 * layout.unit_columns * 2
            )
            warps = each.split  # each with a ring of its own, or one ring
            stages = each.shared_bytes // (chunk * warps)
            assert 3 <= stages <= 5
            assert columns // (layout.unit_columns * each.units) // warps > stages, each.name


def test_right_products_pass(benchmark, gpu):
    budget = benchmark.Budget(3600)
    rows = list(benchmark.check("cpu", ((16, 128), (37, 200)), (1, 9, 257), budget))
    assert [row["format"] for row in rows] == [
        name for _ in range(2) for name in benchmark.FORMATS for _ in range(3)
    ]
    assert all(0 < row["error"] <= 1 for row in rows)
    assert budget.left_out == []


def test_what_there_is_no_time_for_is_named(benchmark, gpu, monkeypatch):
    moments = iter([0.0, 1.0, 4.0, 6.0, 6.0, 3.0, 90.0])
    budget = benchmark.Budget(10.0, lambda: next(moments))
    some = {name: benchmark.FORMATS[name] for name in ("bf16", "int8 g64")}
    monkeypatch.setattr(benchmark, "FORMATS", some)
    rows = list(
        benchmark.check("cpu", ((16, 128),), (1,), budget)
    )  # 0.35 of 10 seconds are over when int8 would begin
    assert [row["format"] for row in rows] == ["bf16"]
    assert list(benchmark.check_programs("cpu", 16, 128, budget)) == []
    assert budget.left(0.6) == 3.0
    assert not budget.allows("times of o")
    assert budget.left_out == [
        "products of int8 g64 [16, 128]",
        "every program of bf16",
        "every program of int8 g64",
        "times of o",
    ]


def test_cublas_is_told_to_sum_in_fp32_while_products_are_checked(benchmark, gpu, monkeypatch):
    right, found = operator._fill, []

    def noted(*arguments: object) -> None:
        found.append(BF16_SUMS.allow_bf16_reduced_precision_reduction)
        right(*arguments)

    monkeypatch.setattr(operator, "_fill", noted)
    monkeypatch.setattr(benchmark, "FORMATS", {"bf16": benchmark.FORMATS["bf16"]})
    usual = BF16_SUMS.allow_bf16_reduced_precision_reduction
    try:
        for before in (True, False):
            BF16_SUMS.allow_bf16_reduced_precision_reduction = before
            for _ in benchmark.check("cpu", ((16, 128),), (1, 257), benchmark.Budget(3600)):
                assert (
                    BF16_SUMS.allow_bf16_reduced_precision_reduction is before
                )  # between two products
    finally:
        BF16_SUMS.allow_bf16_reduced_precision_reduction = usual
    assert found == [False] * 8


@pytest.fixture
def wrong(monkeypatch: pytest.MonkeyPatch):
    """One of 16 results is 3 % too large."""
    right = operator.run_program

    def changed(device, layout, program, x, data, bias, out):
        right(device, layout, program, x, data, bias, out)
        out[-1, 3] *= 1.03

    return changed


def test_a_wrong_product_is_an_error(benchmark, gpu, wrong, monkeypatch):
    monkeypatch.setattr(operator, "run_program", wrong)
    with pytest.raises(
        RacError, match=r"bf16 \[16, 128\] times 1 tokens: wrong by .*do not set RAC_GPU_KERNELS"
    ):
        list(benchmark.check("cpu", ((16, 128),), (1,), benchmark.Budget(3600)))


def test_a_wrong_program_is_an_error_that_names_it(benchmark, gpu, wrong, monkeypatch):
    monkeypatch.setattr(benchmark, "run_program", wrong)
    with pytest.raises(
        RacError, match=r"program rac_24_bf16_r1_t1 of bf16 \[16, 128\] times 13 tokens: wrong by"
    ):
        list(benchmark.check_programs("cpu", 16, 128, benchmark.Budget(3600)))


def test_a_wrong_expanded_weight_is_an_error_that_names_it(benchmark, gpu, monkeypatch):
    right = operator._fill

    def changed(device, layout, x, data, bias, out):
        right(device, layout, x, data, bias, out)
        out[5, 7] += 1.0

    monkeypatch.setattr(operator, "_fill", changed)
    with pytest.raises(
        RacError, match=r"program rac_24_bf16_expand of bf16 \[16, 128\] times 257 tokens: wrong by"
    ):
        list(benchmark.check_programs("cpu", 16, 128, benchmark.Budget(3600)))


def test_prompts_on_cusparselt_are_checked_in_every_2_of_4_format(benchmark, gpu, monkeypatch):
    fake_cusparselt.install(monkeypatch)
    monkeypatch.delenv("RAC_GPU_PROMPTS")  # the check has it whatever the environment asks for
    monkeypatch.setattr(benchmark, "PROMPTS_SHAPE", (32, 256))
    monkeypatch.setattr(benchmark, "captured", Graph)
    missing: dict[str, str] = {}
    rows = list(benchmark.check_prompts("cpu", benchmark.Budget(3600), missing))
    of_24 = [name for name, kind in benchmark.FORMATS.items() if kind[2]]
    assert [(row["format"], row["tokens"]) for row in rows] == [
        (name, n) for name in of_24 for n in (257, 2048)
    ]
    assert all(0 < row["error"] <= 1 for row in rows)
    assert missing == {}
    assert gpu.launches == []

    def wrong(*arguments: object, **options: object) -> torch.Tensor:
        found = fake_cusparselt.sparse_mm(*arguments, **options)
        found[2, 3] *= 1.03
        return found

    monkeypatch.setattr(torch, "_cslt_sparse_mm", wrong)
    with pytest.raises(
        RacError,
        match=r"cuSPARSELt, bf16 \[32, 256\] times 257 tokens: wrong by .*not set RAC_GPU_PROMPTS,",
    ):
        list(benchmark.check_prompts("cpu", benchmark.Budget(3600), missing))


class Graph:
    """What was captured, run again."""

    def __init__(self, run: Callable[[], object]) -> None:
        self.replay = run
        run()


class StaleGraph(Graph):
    """The result for the first activations."""

    def __init__(self, run: Callable[[], object]) -> None:
        run()

    def replay(self) -> None:
        pass


def test_a_graph_of_another_product_is_an_error(benchmark, monkeypatch):
    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    monkeypatch.setattr(benchmark, "captured", Graph)
    benchmark.check_graph("bf16", double, torch.zeros(8, 16))
    monkeypatch.setattr(benchmark, "captured", StaleGraph)
    with pytest.raises(RacError, match="bf16, 8 tokens: a captured graph computes something else"):
        benchmark.check_graph("bf16", double, torch.zeros(8, 16))


@pytest.mark.parametrize("error", [RuntimeError, RacError])
def test_why_cusparselt_is_not_in_a_graph_is_kept(benchmark, gpu, monkeypatch, error):
    def refuse(run: Callable[[], object]) -> None:
        raise error("operation not permitted when stream is capturing\nmore")

    fake_cusparselt.install(monkeypatch)
    monkeypatch.delenv("RAC_GPU_PROMPTS")
    monkeypatch.setattr(benchmark, "captured", refuse)
    monkeypatch.setattr(benchmark, "FORMATS", {"bf16": benchmark.FORMATS["bf16"]})
    monkeypatch.setattr(benchmark, "PROMPTS_SHAPE", (16, 128))
    missing: dict[str, str] = {}
    assert len(list(benchmark.check_prompts("cpu", benchmark.Budget(3600), missing))) == 2
    assert missing == {
        "prompts by cuSPARSELt in a captured graph": "prompts by cuSPARSELt of bf16: operation not permitted when stream is "
        "capturing"
    }
    with pytest.raises(RacError, match="int8: operation not permitted"):  # of a kernel of ours
        benchmark.check_graph("int8", lambda x: x, torch.zeros(8, 16))


def test_why_cusparselt_is_not_here_is_kept(benchmark, gpu, monkeypatch):
    def refuse(dense: torch.Tensor) -> None:
        raise RuntimeError("architecture mismatch")

    missing: dict[str, str] = {}
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    assert list(benchmark.check_prompts("cpu", benchmark.Budget(3600), missing)) == []
    assert missing == {"prompts by cuSPARSELt": f"torch {torch.__version__} has none"}
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    monkeypatch.setattr(torch, "_cslt_compress", refuse)
    assert list(benchmark.check_prompts("cpu", benchmark.Budget(3600), missing)) == []
    assert missing == {
        "prompts by cuSPARSELt": "cuSPARSELt: architecture mismatch; unset RAC_GPU_PROMPTS"
    }


def test_other_bits_the_second_time_are_an_error(benchmark, gpu, monkeypatch):
    right, calls = operator._fill, []

    def unsteady(device, layout, x, data, bias, out):
        right(device, layout, x, data, bias, out)
        calls.append(0)
        if len(calls) == 2:
            out.view(torch.int16)[0, 0] += 1

    monkeypatch.setattr(operator, "_fill", unsteady)
    with pytest.raises(RacError, match=r"other bits the second time"):
        list(benchmark.check("cpu", ((16, 128),), (1,), benchmark.Budget(3600)))
