"""Programs that import llm-compressor, transformers and us in orders of their own, each in a
process that has none of them yet.

Each is a fork of one process, which has imported what those are built on: that is most of
the time that they take.
"""

import contextlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

FOUNDATIONS = (
    "torch", "torch.distributed.tensor", "torch._dynamo.convert_frame", "scipy.optimize",
    "scipy.stats", "pandas",
    "sklearn.metrics", "datasets",
)  # fmt: skip
IN_ORDER = {"llmcompressor", "compressed_tensors", "transformers", "rac_modifier"}


def last_lines(programs: list[str]) -> dict[str, str]:
    """The last line that each program prints, or its traceback."""
    command, root = [sys.executable, "-m", "tests.import_orders"], Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    options = {"capture_output": True, "text": True, "env": environment}
    process = subprocess.run(command, input=json.dumps(programs), **options)
    assert process.returncode == 0, process.stderr
    return dict(zip(programs, json.loads(process.stdout), strict=True))


def _run(program: str) -> str:
    """In a fork. What a library writes into its log is printed too, hence the last line."""
    with tempfile.TemporaryFile("w+") as output:
        child = os.fork()
        if child == 0:
            os.dup2(output.fileno(), 1)
            try:
                exec(compile(program, "program", "exec"), {"__name__": "__main__"})
            except BaseException:
                print(traceback.format_exc().replace("\n", " / "))
            sys.stdout.flush()
            os._exit(0)
        os.waitpid(child, 0)
        output.seek(0)
        return (output.read().strip().splitlines() or [""])[-1]


def main() -> None:
    """Read the programs as JSON, and print the lines as JSON."""
    for name in FOUNDATIONS:
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(name)
    assert not IN_ORDER & {name.partition(".")[0] for name in sys.modules}
    print(json.dumps([_run(program) for program in json.load(sys.stdin)]))


if __name__ == "__main__":
    main()
