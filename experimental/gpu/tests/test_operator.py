"""What the operator launches: which kernel, on which stream, with which addresses; and what it refuses."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import rac_gpu
import torch
from rac_gpu import driver, library, operator
from rac_gpu.layout import ALL, BF16, UNSTRUCTURED, UNSTRUCTURED_INT8, pack
from rac_gpu.library import Device
from rac_gpu.operator import sparse_linear
from rac_gpu.programs import all_programs, part_rows, program

from rac_modifier.errors import RacError
from tests.fake_gpu import STREAM, FakeDriver, code_of
from tests.weights import assert_product, bf16_weight, int8_weight, unstructured_weight

DTYPE = torch.bfloat16
NUMBER = ALL.index(BF16)  # of the layout


@pytest.fixture
def packed(gpu: FakeDriver) -> torch.Tensor:
    """A weight [48, 128], which needs loaded kernels."""
    data = rac_gpu.pack(bf16_weight(48, 128), DTYPE)["weight_packed"]
    gpu.calls.clear()
    return data


@pytest.mark.parametrize(
    ("tokens", "name", "grid"), [(1, "r1_t1", (1, 3)), (16, "r1_t2", (1, 3)), (70, "r1_t4", (3, 3))]
)
def test_one_launch_on_torchs_stream(gpu, packed, tokens, name, grid):
    x, bias = torch.randn(tokens, 128).to(DTYPE), torch.randn(48).to(DTYPE)
    y = sparse_linear(x, packed, NUMBER, 48, 128, bias)
    (launch,) = gpu.launches
    assert (launch.name, launch.grid, launch.stream) == (f"rac_24_bf16_{name}", grid, STREAM)
    assert launch.values == (
        packed.data_ptr(),
        x.data_ptr(),
        bias.data_ptr(),
        y.data_ptr(),
        48,
        128,
        tokens,
        2,
        0,
    )


class OnFirst(torch.Tensor):
    """A tensor in the CPU's memory that says that it is on the first GPU."""

    device = torch.device("cuda", 0)


class OnSecond(torch.Tensor):
    device = torch.device("cuda", 1)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch):
    """The driver of an H100 and an RTX 4090, with torch's own functions of devices and streams replaced, and none of ours."""
    fake = FakeDriver()
    kinds = [(9, 0, 132, 50 << 20), (8, 9, 128, 72 << 20)]

    def properties(device: torch.device) -> SimpleNamespace:
        major, minor, processors, cache = kinds[device.index]
        return SimpleNamespace(
            major=major,
            minor=minor,
            multi_processor_count=processors,
            name=f"GPU {device.index}",
            L2_cache_size=cache,
        )

    @contextmanager
    def current(device: torch.device):
        with fake.on(device.index):
            yield

    monkeypatch.setattr(driver, "bindings", lambda: fake)
    monkeypatch.setattr(library, "compiled", lambda architecture, layout: code_of(layout))
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.cuda, "device", current)
    monkeypatch.setattr(
        torch.cuda,
        "current_stream",
        lambda device: SimpleNamespace(cuda_stream=0xA0 + 0x10 * device.index),
    )
    library.forget()
    yield fake
    library.forget()


@pytest.mark.parametrize("tokens", [1, 16, 300])
def test_each_of_two_gpus_of_different_kinds_has_its_own_module_context_and_stream(
    two_gpus, tokens
):
    """Whatever device is current: what counts is where the tensors are."""
    weight = bf16_weight(
        16 * 130, 64
    )  # 130 tiles: with two per block there is one for each of 128 multiprocessors
    data = pack(weight, BF16)
    for index, capability in enumerate([(9, 0), (8, 9)]):
        assert library.prepare(Device(index, capability, 1), BF16) is None
    x, bias = torch.randn(tokens, 64).to(DTYPE), torch.randn(weight.rows).to(DTYPE)
    two_gpus.contexts.append(0)
    for kind in (OnSecond, OnFirst, OnSecond):
        there = [each.as_subclass(kind) for each in (x, data, bias)]
        y = operator._forward(there[0], there[1], NUMBER, weight.rows, 64, there[2])
        assert isinstance(y, kind)
        assert_product(y.as_subclass(torch.Tensor), x, weight.dequantized(torch.float64), bias)
    assert two_gpus.contexts == [0]
    assert [(launch.device, launch.stream) for launch in two_gpus.launches] == [
        (1, 0xB0),
        (0, 0xA0),
        (1, 0xB0),
    ]
    if tokens == 1:  # the multiprocessors of each decide
        names = [launch.name.removeprefix("rac_24_bf16_") for launch in two_gpus.launches]
        assert names == ["r2_t1", "r1_t1", "r2_t1"]


def test_tensors_on_a_gpu_whose_kernels_were_not_loaded_are_refused(two_gpus):
    data = pack(bf16_weight(48, 128), BF16)
    assert library.prepare(Device(0, (9, 0), 132), BF16) is None
    x = torch.zeros(1, 128, dtype=DTYPE).as_subclass(OnSecond)
    with pytest.raises(
        RacError, match="no GPU kernels are loaded on device 1; pack the weight in this process"
    ):
        operator._forward(x, data.as_subclass(OnSecond), NUMBER, 48, 128, None)
    with pytest.raises(RacError, match="x is on cuda:1; the weight and the bias must be there too"):
        operator._forward(x, data.as_subclass(OnFirst), NUMBER, 48, 128, None)
    assert two_gpus.launches == []


def test_each_program_can_be_run_by_itself(gpu, packed):
    x, here = torch.eye(128).to(DTYPE), Device(0, (9, 0), 132)
    expected = sparse_linear(x, packed, NUMBER, 48, 128)
    gpu.launches.clear()
    for each in all_programs(BF16)[:-1]:
        out = torch.full((128, 48), torch.nan, dtype=DTYPE)
        operator.run_program(here, BF16, each, x, packed, None, out)
        assert torch.equal(out, expected)
        assert (gpu.launches[-1].name, gpu.launches[-1].grid) == (each.name, each.grid(48, 128))
    assert program(BF16, 8, 8).name == gpu.launches[-1].name


def test_nothing_but_launches_while_a_graph_is_captured(gpu, packed):
    gpu.capturing = True
    for tokens in (1, 8, 24, 64, 257):
        sparse_linear(torch.zeros(tokens, 128, dtype=DTYPE), packed, NUMBER, 48, 128)
    assert set(gpu.calls) == {"cuLaunchKernel"}


def test_many_tokens_expand_the_weight_in_parts(gpu, monkeypatch):
    weight = bf16_weight(72, 128)
    packed = rac_gpu.pack(weight, DTYPE)["weight_packed"]
    monkeypatch.setattr(
        operator, "SCRATCH_BYTES", 2 * 128 * 40
    )  # 40 rows, of which two tiles are used
    x, bias = torch.randn(258, 128).to(DTYPE), torch.randn(72).to(DTYPE)
    y = sparse_linear(x, packed, NUMBER, 72, 128, bias)
    assert [launch.values[-1] for launch in gpu.launches] == [0, 2, 4]
    assert [launch.grid for launch in gpu.launches] == [(2, 1), (2, 1), (1, 1)]
    assert len({launch.values[3] for launch in gpu.launches}) == 1  # the same scratch memory
    assert_product(y, x, weight.dequantized(torch.float64), bias)
    assert_product(sparse_linear(x, packed, NUMBER, 72, 128), x, weight.dequantized(torch.float64))


@pytest.mark.parametrize(
    ("make", "kernel", "layout"),
    [(unstructured_weight, "bf16", UNSTRUCTURED), (int8_weight, "8bit", UNSTRUCTURED_INT8)],
)
def test_any_pattern_is_one_launch_too_and_its_rows_are_put_in_their_places(
    gpu, monkeypatch, make, kernel, layout
):
    weight, number = make(90, 128, torch.rand(90, 1)), ALL.index(layout)
    packed = rac_gpu.pack(weight, DTYPE)["weight_packed"]
    exact = weight.dequantized(torch.float64)
    expanded = weight.dequantized(DTYPE).double()
    x, bias = torch.randn(140, 128).to(DTYPE), torch.randn(90).to(DTYPE)
    y = sparse_linear(x[:3], packed, number, 90, 128, bias)
    (launch,) = gpu.launches
    assert (launch.name, launch.grid) == (f"rac_unstructured_{kernel}_r2_t1", (1, 3))
    assert launch.values[4:] == (90, 128, 3, packed.nbytes // 128, 0)
    assert_product(y, x[:3], exact, bias)
    assert_product(sparse_linear(x, packed, number, 90, 128, bias), x, expanded, bias)
    assert_product(sparse_linear(x, packed, number, 90, 128), x, expanded)
    assert [launch.grid for launch in gpu.launches[1:]] == [(3, 1), (3, 1)]
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    every = sparse_linear(x, packed, number, 90, 128)
    assert torch.equal(sparse_linear(x[5:6], packed, number, 90, 128), every[5:6])


@pytest.mark.parametrize(
    ("make", "layout"),
    [(unstructured_weight, UNSTRUCTURED), (int8_weight, UNSTRUCTURED_INT8)],
    ids=["bf16", "int8"],
)
def test_any_pattern_is_expanded_in_parts_of_512_rows_whose_products_are_written_in_place(
    gpu, monkeypatch, make, layout
):
    weight, number = make(552, 32, torch.rand(552, 1)), ALL.index(layout)
    packed, expanded = (
        rac_gpu.pack(weight, DTYPE)["weight_packed"],
        weight.dequantized(DTYPE).double(),
    )
    monkeypatch.setattr(operator, "SCRATCH_BYTES", 2 * 32 * 530)  # 530 rows, of which 512 are used
    x, bias = torch.randn(140, 32).to(DTYPE), torch.randn(552).to(DTYPE)
    y = sparse_linear(x, packed, number, 552, 32, bias)
    assert [(launch.values[-1], launch.grid) for launch in gpu.launches] == [
        (0, (16, 1)),
        (32, (2, 1)),
    ]
    assert len({launch.values[3] for launch in gpu.launches}) == 1  # the same scratch memory
    assert_product(y, x, expanded, bias)


def test_parts_fit_into_half_of_l2_where_that_costs_no_wave_of_the_product():
    scratch = operator.SCRATCH_BYTES
    for columns, cache, rows in [(4096, 0, 7168), (4096, 50 << 20, 2048), (14336, 50 << 20, 2048)]:
        wanted = 28672 if columns == 4096 else 4096
        found = part_rows(BF16, wanted, columns, 2048, 132, cache, scratch)
        assert found == rows, (columns, cache)
        assert 2 * found * columns <= scratch
    assert (
        part_rows(UNSTRUCTURED, 28672, 4096, 2048, 132, 50 << 20, scratch) == 7168
    )  # small parts would idle


@pytest.mark.parametrize("layout", [BF16, UNSTRUCTURED])
@pytest.mark.parametrize(
    ("rows", "columns"), [(16, 8), (1536, 8960), (5120, 27648), (40, 65536), (152064, 3584)]
)
def test_parts_are_whole_tiles_within_the_scratch_memory(layout, rows, columns):
    for tokens in (129, 2048, 16384):
        for cache in (0, 40 << 20):
            step = part_rows(layout, rows, columns, tokens, 108, cache, operator.SCRATCH_BYTES)
            assert step % layout.expanded_rows == 0
            assert 2 * min(step, rows) * columns <= operator.SCRATCH_BYTES


@pytest.mark.parametrize("cut", [slice(0, -1), slice(32, 64), slice(1, None)])
@pytest.mark.parametrize(
    ("make", "layout"), [(unstructured_weight, UNSTRUCTURED), (int8_weight, UNSTRUCTURED_INT8)]
)
def test_a_cut_weight_of_any_pattern_is_refused(gpu, make, layout, cut):
    packed, number = rac_gpu.pack(make(90, 128), DTYPE)["weight_packed"], ALL.index(layout)
    with pytest.raises(
        RacError, match=r"data: torch.int(32|8) \[\d+\] does not fit a weight \[90, 128\]"
    ):
        sparse_linear(torch.zeros(1, 128, dtype=DTYPE), packed[cut], number, 90, 128)
    assert gpu.launches == []


def test_a_batch_invariant_server_gets_the_same_bits_alone_and_among_others(
    gpu, packed, monkeypatch
):
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    x = torch.randn(140, 128).to(DTYPE)
    every = sparse_linear(x, packed, NUMBER, 48, 128)
    assert torch.equal(sparse_linear(x[3:4], packed, NUMBER, 48, 128), every[3:4])
    assert {launch.name for launch in gpu.launches} == {"rac_24_bf16_r1_t4"}


def test_x_may_be_a_view_at_any_address(gpu, packed):
    wide = torch.randn(3, 130).to(DTYPE)
    view = wide[:, 1:129]
    assert torch.equal(
        sparse_linear(view, packed, NUMBER, 48, 128),
        sparse_linear(view.clone(), packed, NUMBER, 48, 128),
    )
    flat = torch.randn(129).to(DTYPE)[1:]
    assert torch.equal(
        sparse_linear(flat, packed, NUMBER, 48, 128),
        sparse_linear(flat.clone(), packed, NUMBER, 48, 128),
    )


def test_no_token_is_no_launch(gpu, packed):
    assert sparse_linear(torch.zeros(0, 128, dtype=DTYPE), packed, NUMBER, 48, 128).shape == (0, 48)
    assert gpu.launches == []


def test_kernels_that_were_not_loaded_are_an_error_and_are_not_loaded_now(gpu, packed):
    library.forget()
    gpu.capturing = True
    with pytest.raises(RacError, match="no GPU kernels are loaded on device 0"):
        sparse_linear(torch.zeros(1, 128, dtype=DTYPE), packed, NUMBER, 48, 128)


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        (
            {"x": torch.zeros(1, 128)},
            r"x: torch.float32 \[1, 128\]; the sparse GPU kernel takes bfloat16 with 128 columns",
        ),
        ({"x": torch.zeros(1, 64, dtype=DTYPE)}, r"x: torch.bfloat16 \[1, 64\]"),
        (
            {"x": torch.zeros(1, 100, dtype=DTYPE), "columns": 100},
            "a weight of 100 columns: .* a multiple of 8",
        ),
        ({"rows": 64}, r"data: torch.uint8 \[.*\] does not fit a weight \[64, 128\]"),
        ({"data": torch.zeros(4, dtype=torch.uint8)}, r"data: torch.uint8 \[4\] does not fit"),
        (
            {"number": ALL.index(UNSTRUCTURED)},
            r"data: .* does not fit a weight \[48, 128\] in the layout unstructured",
        ),
        (
            {"number": len(ALL)},
            rf"layout {len(ALL)}: there are {len(ALL)}; pass what `pack` returned",
        ),
        ({"bias": torch.zeros(47, dtype=DTYPE)}, r"bias: torch.bfloat16 \[47\]"),
        ({"bias": torch.zeros(48)}, r"bias: torch.float32 \[48\]"),
        (
            {"bias": torch.zeros(48, dtype=DTYPE, device="meta")},
            "x is on cpu; the weight and the bias must be there too",
        ),
    ],
)
def test_what_does_not_fit_is_refused(packed, changed, problem):
    arguments = {
        "x": torch.zeros(1, 128, dtype=DTYPE),
        "data": packed,
        "number": NUMBER,
        "rows": 48,
        "columns": 128,
        "bias": None,
    } | changed
    with pytest.raises(RacError, match=problem):
        operator._forward(**arguments)
    assert BF16.nbytes(48, 128) == packed.numel()
