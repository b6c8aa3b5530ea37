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
from rac_modifier.kernels.cpu.support import support
from tests.kernels.cpu.arm import (
    PROCESSORS,
    arm_program,
    emulated,
    take_arm,
)
from tests.kernels.cpu.kernel_helpers import integers, random_mask, sparse, take

AARCH64 = 183  # EM_AARCH64 of elf.h


@pytest.mark.parametrize(
    ("processor", "runs"),
    [
        ("cortex-a72", ["portable", "neon"]),
        ("neoverse-n1", ["portable", "neon"]),
        ("max,sve=off", ["portable", "neon", "i8mm"]),
    ],
)
def test_a_processor_runs_what_it_has_and_refuses_the_rest(
    arm_processor, monkeypatch, processor, runs
):
    arm = arm_processor(processor)
    assert list(arm.runs) == runs
    assert [kernel.name for kernel in arm.kernels.values()] == ["portable", "neon", "i8mm"]
    take_arm(arm, runs[-1], monkeypatch)
    _, weight = sparse(random_mask(20, 40, 0.5), torch.bfloat16)
    x, out = torch.randn(3, 40), torch.zeros(3, 20)
    for isa in arm.kernels:
        take_arm(arm, isa, monkeypatch)
        if isa in runs:
            arm.linear(*weight, x, None, None, out, isa)
            assert support().isa == isa
        else:
            with pytest.raises(RacError, match=r"this processor does not run kernel \d; set RAC"):
                arm.linear(*weight, x, None, None, out, isa)
            with pytest.raises(RacError, match=f'RAC_KERNEL="{isa}": this machine runs portable'):
                support()


@pytest.fixture(scope="module")
def driver(arm_path, tmp_path_factory):
    return arm_program(tmp_path_factory.mktemp("driver"), "drive.cpp", arm_path)


@pytest.mark.parametrize("processor", PROCESSORS.values())
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
        packed += [
            [sparse(random_mask(37, 70, 0.5), torch.bfloat16)[1], integers("int8", 37, 70)[1]]
        ]
    for here, there in zip(*packed, strict=True):
        assert torch.equal(here.data, there.data)


def test_setup_builds_the_library_for_arm(arm_path):
    assert struct.unpack_from("<H", arm_path.read_bytes(), 18) == (AARCH64,)
