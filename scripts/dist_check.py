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
from typing import Any

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
from llmcompressor.recipe import Recipe
from transformers import AutoModelForCausalLM
assert "site-packages" in rac_modifier.__file__, rac_modifier.__file__
a, b = rac_modifier.load_model(sys.argv[1]), AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert all(torch.equal(t, b.state_dict()[name]) for name, t in a.state_dict().items())
layer = a.model.layers[0].mlp.up_proj.weight
assert (layer.view(-1, 4) == 0).sum(1).min() >= 2
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
        env = clean(os.environ | {"PATH": path or self.path})
        command = [str(self.bin / "python"), "-m", "pip", "install", "--quiet", *packages]
        check(command, env=env, cwd=self.home.parent)

    def run(self, *command: str) -> str:
        """What a program of this environment prints, run by the user, in the user's own folder."""
        env = clean(os.environ | {"PATH": self.path, "HOME": str(self.home)})
        env |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
        env |= {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
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

    def make_read_only(self) -> None:
        """Keep this user from writing to it; nobody cannot write to root's files already."""
        if os.geteuid() != 0:
            check(["chmod", "-R", "a-w", str(self.folder)])
        code = "import os, sysconfig; print(os.access(sysconfig.get_path('platlib'), os.W_OK))"
        if self.run("python", "-c", code).strip() != "False":
            sys.exit(f"the user may write to {self.folder}; this would test nothing")


def main() -> None:
    """Run all steps; the first that fails ends the script with exit code 1."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dist", type=Path, help="folder with the wheel and the sdist")
    parser.add_argument("--python", help="default: this one, or one in /usr/bin")
    parser.add_argument("--skip-serving", action="store_true", help="leave out step 4")
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
            environment = Environment(folder / "compress", home)
            compress(environment, python, wheel)
            from_source(environment, sdist)
            if not args.skip_serving:
                serve(Environment(folder / "serving", home), python, wheel)
        finally:
            make_writable(folder)
    step("all steps passed")


def compress(environment: Environment, python: str, wheel: Path) -> None:
    """Step 1, and 2: what the README's user does."""
    step(f"{wheel.name}[compress] into {environment.folder}, no compiler on PATH")
    check([python, "-m", "venv", str(environment.folder)])
    environment.install("--upgrade", "pip")
    environment.install(f"{wheel}[compress]")
    environment.make_read_only()
    step("rac recipes")
    print(environment.run("rac", "recipes").splitlines()[0])
    settings = [argument for setting in SETTINGS for argument in ("--set", setting)]
    step("rac prune reasoner 'out put' --recipe rac_2of4")
    options = ["--recipe", "rac_2of4", "--precision", "float32", *settings]
    print(environment.run("rac", "prune", "reasoner", "out put", *options).splitlines()[-1])
    step("rac inspect 'out put', load_model, from_pretrained, rac_modifier.recipe")
    print(environment.run("rac", "inspect", "out put").strip().splitlines()[-1])
    environment.python(LOAD, "out put")
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
    check(script, env=env, cwd=environment.home.parent)
    environment.make_read_only()
    print(environment.python(KERNEL), end="")
    output = environment.python(SERVE, str(environment.home / "out put"))
    print(*[line for line in output.splitlines() if "rac:" in line or "SERVED" in line], sep="\n")
    if not ("SERVED" in output and "compressed layers run on a kernel" in output):
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
        runs = shutil.which(candidate) and subprocess.run(command, capture_output=True, cwd="/")
        if runs and not runs.returncode:
            return candidate
    sys.exit("no Python that the unprivileged user can run; name one with --python")


def as_user() -> list[str]:
    """The command that turns root into nobody."""
    if os.geteuid() != 0:
        return []
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        sys.exit("as root this needs setpriv (of util-linux), or run it as another user")
    # Through env, since setpriv itself may still start what only root can reach.
    return [setpriv, f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "/usr/bin/env"]


def make_writable(folder: Path) -> None:
    """Undo `make_read_only`."""
    if os.geteuid() != 0:
        check(["chmod", "-R", "u+w", str(folder)])


def clean(environment: dict[str, str]) -> dict[str, str]:
    """Without what would lead back to the clone, to a compiler or to another user's cache."""
    dropped = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "CC", "CXX", "XDG_CACHE_HOME")
    return {name: value for name, value in environment.items() if name not in dropped}


def check(command: list[str], **options: Any) -> None:
    """Run a program, and end the script if it fails."""
    if code := subprocess.run(command, **options).returncode:
        sys.exit(f"failed with exit code {code}: {' '.join(command)}")


def step(text: str) -> None:
    """Say what comes next, and when."""
    print(f"== {time.strftime('%H:%M:%S')} {text}", flush=True)


if __name__ == "__main__":
    main()
