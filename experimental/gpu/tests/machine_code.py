"""The kernels as machine code: compiled by NVRTC, disassembled, and the hot loop found in it. No GPU is needed."""

from __future__ import annotations

import functools
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
from rac_gpu import nvrtc
from rac_gpu.layout import Layout
from rac_gpu.library import compile_options
from rac_gpu.sources import read_sources

from rac_modifier.errors import RacError
from tests.kept_builds import kept_build


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

    def first(self, operation: str) -> int:
        """Where the first of these instructions is in the loop."""
        return next(
            n for n, each in enumerate(self.loop) if operation_of(each).startswith(operation)
        )

    def unfinished_groups(self) -> int:
        """The number of cp.async.wait_group: groups of copies that the loop's wait, the only one, leaves under way.

        All architectures here have `DEPBAR.LE SB0, 0x2` for it; an instruction of another form fails.
        """
        waits = [each for each in self.instructions if operation_of(each).startswith("DEPBAR")]
        assert len(waits) == 1, waits
        assert waits[0] in self.loop, waits
        found = re.fullmatch(r"DEPBAR\.LE SB0, 0x([0-9a-f]+) ;", waits[0])
        assert found, waits
        return int(found[1], 16)


def operation_of(instruction: str) -> str:
    """Such as HMMA.SP.16832.F32.BF16, without a predicate."""
    return re.sub(r"^@!?U?P[\dT]+ +", "", instruction).split(" ")[0]


def compiler() -> nvrtc.Compiler:
    """NVRTC; skips the test with the reason where it is not installed."""
    try:
        return nvrtc.load()
    except RacError as error:
        pytest.skip(str(error))


def disassembler() -> str:
    """Path of nvdisasm: of nvidia-cuda-nvdisasm, or of Triton; skips the test where there is neither."""
    for entry in sys.path:
        for place in ("nvidia/cu13/bin/nvdisasm", "triton/backends/nvidia/bin/nvdisasm"):
            if (Path(entry) / place).is_file():
                return str(Path(entry) / place)
    found = shutil.which("nvdisasm")
    if found is None:
        pytest.skip("no nvdisasm: pip install nvidia-cuda-nvdisasm")
    return found


@functools.cache
def kernels(layout: Layout, architecture: str) -> dict[str, Kernel]:
    """The kernels of a layout by name."""
    chosen, tool = compiler(), disassembler()
    sources, options = (
        read_sources(),
        [*compile_options(architecture, layout), "--ptxas-options=-v"],
    )
    what = (chosen.version, tool, sources, layout.source, options)

    def build(out: Path) -> None:
        code, log = chosen.build(sources, layout.source, options)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            cubin.write(code)
            cubin.flush()
            done = subprocess.run([tool, "-c", cubin.name], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        out.write_text(json.dumps({"log": log, "code": done.stdout}))

    digest = hashlib.sha256(repr(what).encode()).hexdigest()[:16]
    found = json.loads(kept_build(f"_machine_code_{digest}.json", build).read_text())
    return {name: _kernel(name, body, found["log"]) for name, body in _bodies(found["code"])}


def _bodies(text: str) -> list[tuple[str, str]]:
    return re.findall(r"^\.text\.(rac_\w+):\n(.*?)(?=^//-|\Z)", text, re.DOTALL | re.MULTILINE)


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
    assert registers
    assert spills
    return Kernel(
        name, instructions, min(loops, key=len, default=[]), int(registers[1]), int(spills[1])
    )


def operations(kernel: Kernel) -> Counter[str]:
    """How often each operation occurs in the loop, for a message."""
    return Counter(operation_of(each).split(".")[0] for each in kernel.loop)
