"""What the compiler makes of the kernels, for every architecture: registers, spills, the instructions of the hot loop.

NVRTC compiles, nvdisasm disassembles; no GPU is needed.
"""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from rac_gpu import nvrtc
from rac_gpu.layout import UNIT
from rac_gpu.library import compiled
from rac_gpu.programs import CHUNKS, Program

from rac_modifier.errors import RacError

ARCHITECTURES = ["sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120"]
# Another group changes only how many scales are read: one architecture shows it.
BUILDS = [*((128, each) for each in ARCHITECTURES), (64, "sm_90a")]
# Instructions of the loop per weight of a lane, at most, by row tiles and token tiles; 5 to 10 % over what NVRTC 13.5 makes. From
# data sheets, a B200 can issue 1.8 while it reads a weight: there, more than 8 tokens are bound by instructions.
MOST = {(2, 1): 1.5, (2, 2): 2.15, (2, 4): 3.0, (4, 1): 1.5, (4, 2): 1.8, (4, 4): 2.3}
MOST_REGISTERS = {128: 168, 64: 255}  # by threads: three blocks fit into 65,536


@dataclass(frozen=True)
class Kernel:
    """A kernel's instructions, those of the innermost loop with a product, and what ptxas says."""

    name: str
    instructions: list[str]
    loop: list[str]
    registers: int
    spills: int

    def count(self, operation: str) -> int:
        """Instructions of the loop that begin with this."""
        return sum(operation_of(instruction).startswith(operation) for instruction in self.loop)


def operation_of(instruction: str) -> str:
    """Such as HMMA.SP.16832.F32.BF16, without a predicate."""
    return re.sub(r"^@!?U?P[\dT]+ +", "", instruction).split(" ")[0]


@functools.cache
def kernels(group: int, architecture: str) -> dict[str, Kernel]:
    """The kernels for a group by name; skips the test where a tool is not installed."""
    found = [Path(entry) / "nvidia/cu13/bin/nvdisasm" for entry in sys.path]
    tool = next((path for path in found if path.is_file()), shutil.which("nvdisasm"))
    try:
        nvrtc.load()
    except RacError as error:
        pytest.skip(str(error))
    if tool is None:
        pytest.skip("no nvdisasm: pip install nvidia-cuda-nvdisasm")
    code, log = compiled(architecture, group, "--ptxas-options=-v")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(code)
        cubin.flush()
        text = subprocess.check_output([str(tool), "-c", cubin.name], text=True)
    bodies = re.findall(r"^\.text\.(rac_\w+):\n(.*?)(?=^//-|\Z)", text, re.DOTALL | re.MULTILINE)
    return {name: _kernel(name, body, log) for name, body in bodies}


def _kernel(name: str, body: str, log: str) -> Kernel:
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in body.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif re.match(r"\s+/\*[0-9a-f]{4,}\*/", line):
            instructions.append(re.sub(r"/\*.*?\*/", "", line).strip())
    loops = []
    for end, instruction in enumerate(instructions):
        target = re.search(r"BRA.*`\((\.L_x_\d+)\)", instruction)
        start = labels.get(target[1], end + 1) if target else end + 1
        loop = instructions[start : end + 1]
        if any("HMMA" in each for each in loop):
            loops.append(loop)
    info = log[log.index(f"'{name}' for") :]
    registers = re.search(r"Used (\d+) registers", info)
    spills = re.search(r"(\d+) bytes spill stores", info)
    assert registers is not None is not spills
    loop = min(loops, key=len, default=[])
    return Kernel(name, instructions, loop, int(registers[1]), int(spills[1]))


def decode_kernels(group: int, architecture: str) -> list[tuple[Program, Kernel]]:
    found = kernels(group, architecture)
    return [(each, found[each.name]) for each in (Program(group, *tiles) for tiles in CHUNKS)]


@pytest.mark.parametrize(("group", "architecture"), BUILDS)
class TestMachineCode:
    def test_nothing_is_spilled_and_no_local_memory_is_used(self, group, architecture):
        for name, kernel in kernels(group, architecture).items():
            assert kernel.spills == 0, name
            local = [each for each in kernel.instructions if each.split(" ")[0] in ("LDL", "STL")]
            assert not local, name
        for program, kernel in decode_kernels(group, architecture):
            assert kernel.registers <= MOST_REGISTERS[program.threads], kernel.name

    def test_the_loop_has_the_sparse_products_and_no_others(self, group, architecture):
        for program, kernel in decode_kernels(group, architecture):
            products = program.row_tiles * program.token_tiles * program.units * UNIT // 32
            assert kernel.count("HMMA.SP") == kernel.count("HMMA") == products, kernel.name

    def test_weights_come_by_asynchronous_copies_of_16_bytes(self, group, architecture):
        """All of a chunk, ahead of its use."""
        for program, kernel in decode_kernels(group, architecture):
            copies = kernel.count("LDGSTS")
            assert copies == sum(".128" in each for each in kernel.loop if "LDGSTS" in each)
            assert kernel.count("LDG.") == kernel.count("STG") == kernel.count("STS") == 0
            pieces = program.chunk_bytes / 16
            assert pieces / 32 <= copies < pieces / 32 + 2, kernel.name

    def test_the_loop_is_within_its_budget(self, group, architecture):
        for program, kernel in decode_kernels(group, architecture):
            if program.row_tiles > 1 and group == 128:
                weights = 16 * kernel.count("HMMA.SP") / program.token_tiles  # of a lane
                most = MOST[program.row_tiles, program.token_tiles]
                assert len(kernel.loop) / weights <= most, kernel.name
