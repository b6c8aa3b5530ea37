"""The three functions of the backend: decisions with their reasons, and products end to end on the emulator."""

from __future__ import annotations

import importlib
import inspect
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import rac_gpu
import torch
from rac_gpu import backend, check, library
from rac_gpu.check import random_weight
from rac_gpu.library import Device

from rac_modifier.errors import RacError
from rac_modifier.formats.encoding import Encoding
from rac_modifier.kernels import choose
from rac_modifier.kernels.interface import Backend, Layer
from tests.conftest import H100, STREAM, assert_product

BF16 = torch.bfloat16
LAYER = Layer(4096, 4096, 0.5, Encoding("int", 4, 128), BF16, group_bytes=2, two_of_four=True)


def test_rac_modifier_finds_it_and_its_functions_have_the_parameters_of_the_protocol(
    gpu, monkeypatch
):
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert importlib.import_module(project["entry-points"][choose.GROUP]["cuda"]) is rac_gpu
    for name in ("can_run", "pack", "linear"):
        expected = list(inspect.signature(getattr(Backend, name)).parameters)[1:]
        assert list(inspect.signature(getattr(rac_gpu, name)).parameters) == expected
    monkeypatch.setitem(choose.BACKENDS, "cuda", rac_gpu)
    decision, found = choose.choose(LAYER, "cuda")
    assert found is rac_gpu
    assert "never run on a GPU" in decision.reason
    assert decision.bytes_per_weight == 4 / 8 / 2 + 2 / 8 / 2 + 2 / 128


@pytest.mark.parametrize(
    "changed",
    [
        {"served": torch.float16},
        {"encoding": Encoding("int", 4, 32)},
        {"group_bytes": 4},
        {"two_of_four": False},
        {"encoding": Encoding("int", 4, 128, symmetric=False)},
        {"encoding": Encoding("int", 3, 128)},
        {"encoding": Encoding("int", 8, 128)},
        {"columns": 100, "encoding": Encoding("int", 4)},
    ],
)
def test_a_layer_that_no_kernel_takes_stays_dense(gpu, changed):
    decision = rac_gpu.can_run(replace(LAYER, **changed))
    assert (decision.sparse, decision.kernel) == (False, "dense")
    assert decision.reason.startswith("dense because ")


def test_a_device_that_cannot_leaves_the_layer_dense(monkeypatch):
    for device in (None, Device(0, (7, 5), 40)):
        monkeypatch.setattr(library, "current_device", lambda device=device: device)
        assert not rac_gpu.can_run(LAYER).sparse

    def refuse(*arguments: object) -> None:
        raise RacError("no compiler")

    monkeypatch.setattr(library, "current_device", lambda: H100)
    monkeypatch.setattr(library, "compiled", refuse)
    monkeypatch.setattr(library, "_loaded", {})
    assert rac_gpu.can_run(LAYER).reason == "dense because no compiler"
    with pytest.raises(RacError, match=r"no GPU kernels are loaded on device 0 \(no compiler\)"):
        library.module(H100, 128)


@pytest.mark.parametrize("tokens", [1, 9, 40, 140])
def test_packed_and_multiplied_as_the_dense_weight(gpu, monkeypatch, tokens):
    monkeypatch.setattr(backend, "_SCRATCH_BYTES", 2 * 192 * 40)  # 40 rows: two tiles at a time
    weight = random_weight(50, 192, 64)
    packed = rac_gpu.pack(weight, BF16)
    x, bias = torch.randn(tokens, 192).to(BF16), torch.randn(50).to(BF16)
    dense = weight.dequantized(BF16 if tokens > 64 else torch.float64)  # expanded, it is rounded
    assert_product(rac_gpu.linear(x, packed, 50, 192, bias), x, dense.double(), bias)
    assert {launch.stream for launch in gpu} == {STREAM}
    assert [launch.values[-1] for launch in gpu] == ([0, 2] if tokens > 64 else [0])
    assert rac_gpu.linear(x.view(1, tokens, 192), packed, 50, 192).shape == (1, tokens, 50)
    assert rac_gpu.linear(x[:0], packed, 50, 192).shape == (0, 50)
    wide = torch.cat([x, x], dim=1)[:, 1:193]  # a view at any address
    assert torch.equal(
        rac_gpu.linear(wide, packed, 50, 192), rac_gpu.linear(wide.clone(), packed, 50, 192)
    )


def test_a_batch_invariant_server_gets_the_same_bits_alone_and_among_others(gpu, monkeypatch):
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    packed, x = rac_gpu.pack(random_weight(48, 128, 128), BF16), torch.randn(140, 128).to(BF16)
    every = rac_gpu.linear(x, packed, 48, 128)
    assert torch.equal(rac_gpu.linear(x[3:4], packed, 48, 128), every[3:4])


def test_under_torch_compile(gpu):
    packed = rac_gpu.pack(random_weight(32, 128, 128), BF16)
    step = torch.compile(
        lambda x: rac_gpu.linear(x, packed, 32, 128) * 2, fullgraph=True, backend="aot_eager"
    )
    x = torch.randn(3, 128).to(BF16)
    assert torch.equal(step(x), rac_gpu.linear(x, packed, 32, 128) * 2)


@pytest.mark.parametrize(
    "changed",
    [
        {"x": torch.zeros(1, 128)},
        {"x": torch.zeros(1, 64, dtype=BF16)},
        {"x": torch.zeros(1, 100, dtype=BF16), "columns": 100},
        {"rows": 64},
        {"data": torch.zeros(4, dtype=torch.uint8)},
        {"group": 64},
        {"group": 96},
        {"bias": torch.zeros(47, dtype=BF16)},
        {"bias": torch.zeros(48)},
        {"bias": torch.zeros(48, dtype=BF16, device="meta")},
    ],
)
def test_what_does_not_fit_is_refused_before_a_launch(gpu, changed):
    data = rac_gpu.pack(random_weight(48, 128, 128), BF16)["weight_packed"]
    x = torch.zeros(1, 128, dtype=BF16)
    arguments = {"x": x, "data": data, "group": 128, "rows": 48, "columns": 128, "bias": None}
    backend._forward(**arguments)
    with pytest.raises(RacError):
        backend._forward(**arguments | changed)
    assert len(gpu) == 1


def test_what_cannot_be_packed_is_refused(gpu):
    with pytest.raises(RacError, match=r"served in torch\.float16 have no GPU kernel here"):
        rac_gpu.pack(random_weight(32, 128, 128), torch.float16)


def test_the_check_launches_every_program_and_stops_at_a_wrong_result(gpu, monkeypatch):
    rows = [*check.check_programs("cpu", 24, 136), *check.check_linear("cpu", [(37, 200)], [1, 90])]
    assert {row["program"] for row in rows[:18]} <= {launch.name for launch in gpu}
    assert all(0 < row["error"] <= 1 for row in rows)
    right = backend.run_program

    def wrong(device, program, x, data, bias, out):
        right(device, program, x, data, bias, out)
        out[-1, 3] *= 1.03

    monkeypatch.setattr(check, "run_program", wrong)
    with pytest.raises(RacError, match=r"rac_24_int4_r1_t1 .*\[16, 128\].*: wrong by"):
        list(check.check_programs("cpu", 16, 128))
