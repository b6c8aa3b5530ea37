"""What `make gpu-check` runs on a machine with a GPU, within ten minutes: three parts, each with a time limit.

    make gpu-check            (GPU_PYTHON: the python that has torch for CUDA, or vLLM)

A part that is ended, or that lacks a package and is not run, is named at the end, with what is not known then; `gpu.json` and
`gpu-served.json` keep what was finished. After a part that fails, nothing else runs. The exit status is 0 where no part failed or
was ended.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
GRACE = 5.0  # seconds between asking a part to end and killing it


@dataclass(frozen=True)
class Part:
    """A command of python's. `needs`: packages; `seconds`: its limit; `without`: what is not known if it does not finish."""

    name: str
    arguments: tuple[str, ...]
    seconds: float
    without: str
    needs: tuple[str, ...] = ()


PARTS = (
    Part(
        "kernels",
        (str(HERE / "gpu_kernels.py"), "--json", "gpu.json", "--seconds", "300"),
        335,
        "checks and times that gpu.json does not have",
    ),
    Part(
        "served model",
        (str(HERE / "gpu_served.py"), "--json", "gpu-served.json"),
        175,
        "whether a model that vLLM serves on the kernels gives the tokens of the dense one",
        ("vllm",),
    ),
    Part(
        "tests",
        ("-m", "pytest", "-q", str(HERE.parent / "tests" / "kernels" / "cuda" / "test_on_gpu.py")),
        55,
        "tests/kernels/cuda/test_on_gpu.py, which repeats some of the kernels' checks",
        ("pytest", "hypothesis", "numpy"),
    ),
)


def end(running: subprocess.Popen[bytes]) -> None:
    """End a part and all that it started: they are asked to, so that they remove their files, and then killed."""
    for kind in (signal.SIGINT, signal.SIGKILL):
        try:
            os.killpg(running.pid, kind)
        except ProcessLookupError:
            break
        try:
            running.wait(GRACE)
        except subprocess.TimeoutExpired:
            continue
    running.wait()


def missing(part: Part) -> str | None:
    """Why a part cannot run here, with the next step; None if it can."""
    names = " ".join(name for name in part.needs if importlib.util.find_spec(name) is None)
    return f"not run, since this python lacks packages: pip install {names}" if names else None


def run(part: Part) -> str | None:
    """Run a part; None if it ran through, else why not.

    Raises:
        SystemExit: it failed.
    """
    print(f"gpu-check: {part.name}, at most {part.seconds:.0f} seconds", flush=True)
    running = subprocess.Popen([sys.executable, *part.arguments], start_new_session=True)
    try:
        code = running.wait(part.seconds)
    except subprocess.TimeoutExpired:
        end(running)
        return f"ended after its {part.seconds:.0f} seconds"
    except BaseException:
        end(running)
        raise
    if code:
        raise SystemExit(
            f"gpu-check: {part.name} failed (exit status {code}); nothing else was run"
        )
    return None


def main(parts: Sequence[Part] = PARTS) -> int:
    """The exit status."""
    lacking = {part: why for part in parts if (why := missing(part)) is not None}
    ended = {part: why for part in parts if part not in lacking and (why := run(part)) is not None}
    for part, why in (lacking | ended).items():
        print(f"gpu-check: {part.name}: {why}; not known: {part.without}", flush=True)
    if not lacking and not ended:
        print(f"gpu-check: all {len(parts)} parts ran through", flush=True)
    return 1 if ended else 0


if __name__ == "__main__":
    raise SystemExit(main())
