"""The library on emulated ARM processors: what each runs, what it refuses, and random and hostile calls.

The products are compared in the tests that take a kernel (conftest.py), beside those of the other instruction sets.
"""

from __future__ import annotations

import os
import struct
import subprocess

import pytest
import torch

from rac_modifier.errors import RacError
from rac_modifier.kernels.cpu.library import ISAS
from rac_modifier.kernels.cpu.support import support
from tests.kernels.cpu.arm import (
    COMPILER,
    PROCESSORS,
    VECTORS,
    arm_program,
    emulated,
    need_tool,
    take_arm,
)
from tests.kernels.cpu.kernel_helpers import random_mask, sparse, take
from tests.kernels.cpu.test_build import build
from tests.kernels.cpu.test_int8_product import integers

AARCH64 = 183  # EM_AARCH64 of elf.h


@pytest.mark.parametrize(
    ("processor", "runs"),
    [
        ("cortex-a72", ["portable", "neon"]),
        ("neoverse-n1", ["portable", "neon", "dotprod"]),
        ("max,sve=off", ["portable", "neon", "dotprod", "i8mm"]),
        ("a64fx", ["portable", "neon", "sve"]),
    ],
)
def test_a_processor_runs_what_it_has_and_refuses_the_rest(
    arm_processor, monkeypatch, processor, runs
):
    arm = arm_processor(processor)
    assert list(arm.runs) == runs
    assert arm.best == runs[-1]
    take_arm(arm, runs[-1], monkeypatch)
    _, weight = sparse(random_mask(20, 40, 0.5), torch.bfloat16)
    x, out = torch.randn(3, 40), torch.zeros(3, 20)
    for isa in ISAS:
        take_arm(arm, isa, monkeypatch)
        if isa in runs:
            arm.linear(*weight, x, None, None, out, isa)
            assert support().isa == isa
        else:
            with pytest.raises(
                RacError, match=r"this processor does not run instruction set \d; set RAC_KERNEL"
            ):
                arm.linear(*weight, x, None, None, out, isa)
            with pytest.raises(
                RacError, match=rf"RAC_KERNEL={isa}: this machine runs {', '.join(runs)}; use one"
            ):
                support()


@pytest.fixture(scope="module")
def driver(arm_path, tmp_path_factory):
    return arm_program(tmp_path_factory.mktemp("driver"), "drive.cpp", arm_path)


@pytest.mark.parametrize(
    "processor", [*PROCESSORS.values(), VECTORS[128], VECTORS[256], VECTORS[2048]]
)
def test_random_and_hostile_calls(driver, processor):
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(
        emulated(processor, driver, "10"), capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "10 weights" in done.stdout


def test_packed_data_is_the_same_as_here(arm_processor, native_path, monkeypatch):
    packed = []
    for use in (
        lambda: take(native_path, None, monkeypatch),
        lambda: take_arm(arm_processor("cortex-a72"), "neon", monkeypatch),
    ):
        monkeypatch.undo()
        use()
        packed += [[sparse(random_mask(37, 70, 0.5), torch.bfloat16)[1], integers(37, 70, 0.5)[1]]]
    for here, there in zip(*packed, strict=True):
        assert torch.equal(here.data, there.data)


@pytest.mark.slow
def test_setup_builds_the_library_for_arm(tmp_path):
    need_tool(COMPILER)
    done = build(
        tmp_path,
        CC=COMPILER,
        CXX=COMPILER,
        LDSHARED=f"{COMPILER} -shared",
        LDCXXSHARED=f"{COMPILER} -shared",
    )
    assert done.returncode == 0, done.stderr
    (built,) = (tmp_path / "lib").rglob("_native*.so")
    assert struct.unpack_from("<H", built.read_bytes(), 18) == (AARCH64,)
