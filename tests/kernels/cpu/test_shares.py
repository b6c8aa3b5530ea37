"""Which thread packs and multiplies which panels (csrc/gemm/shares.h): where cores are alike, and where they are not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from tests.kernels.cpu.arm import arm_program
from tests.kernels.cpu.kernel_helpers import CSRC, FLAGS, HERE, run

ENVIRONMENT = {
    **os.environ,
    "OMP_WAIT_POLICY": "PASSIVE",
    "OMP_PROC_BIND": "false",
    "OMP_DYNAMIC": "false",
}


@pytest.mark.parametrize("differ", [0, 1])
def test_every_panel_is_in_one_share_and_a_slow_core_gets_fewer(tmp_path, differ):
    if shutil.which("g++") is None:
        pytest.skip("no g++ on this machine")
    program = str(tmp_path / "shares")
    run(
        "g++",
        *FLAGS,
        "-O1",
        "-fopenmp",
        f"-DDIFFER={differ}",
        str(HERE / "shares.cpp"),
        "-o",
        program,
    )
    done = subprocess.run([program], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    panels = int(done.stdout.split()[4])
    if differ:
        assert (
            panels < 256 / 4
        )  # 50 times as slow: one share of 16 panels, or a few if the machine is busy
    else:
        assert panels == 256 / 2


@pytest.mark.skipif(sys.platform != "linux", reason="reads faults as Linux reports them")
@pytest.mark.parametrize("threads", [2, 5])
def test_a_thread_reads_the_pages_that_it_was_the_first_to_write(native_path, tmp_path, threads):
    """So they are in the memory of its NUMA node. Pages with the end of one share and the start of the next may differ."""
    source = tmp_path / "differ.cpp"
    source.write_text('#include "processor.h"\nint main() { return rac::cores_differ(); }\n')
    run("g++", *FLAGS, str(source), str(CSRC / "processor.cpp"), "-o", str(tmp_path / "differ"))
    if subprocess.run([str(tmp_path / "differ")]).returncode:
        pytest.skip("the cores of this machine differ, so threads take shares by turns")
    program = arm_program(tmp_path, "first_touch.cpp", native_path, "g++")
    done = subprocess.run(
        [str(program), str(threads)], capture_output=True, text=True, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr
    found = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert [kind for kind, _, _ in found] == [0, 2, 3, 4, 5]
    for kind, pages, same in found:
        assert pages > 300, kind
        assert pages - same <= 6 * (threads - 1), (
            kind,
            pages,
            same,
        )  # masks and values: two places for each two shares
