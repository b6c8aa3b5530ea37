"""Install what `make dist` built as a user does, and use it.

    make test-dist     (or: python scripts/dist_check.py dist; about 10 minutes, 6 GB of disk)

It works away from the clone, in a folder with a space in its name:

1. The wheel with [compress] goes into a new environment, with no compiler on PATH.
2. A user who may not write there lists the recipes, prunes the embedded reasoner, inspects the
   result, loads it, and multiplies on the compiled kernel. Only torch's libgomp is in the process.
3. The wheel with vLLM for a CPU goes into a second environment, where the same user serves the
   pruned reasoner (--skip-serving leaves this out).
4. The wheel with [traces] alone goes into a third one, which collects traces from a server.

As root, the user is `nobody`; otherwise it is you, and the environments are made read-only.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NOBODY = 65534
IS_ROOT = os.geteuid() == 0
AS_USER = [str(shutil.which("setpriv")), f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
SETTINGS = (
    "calibration.tokens=4096",
    "traces.sampling.max_new_tokens=128",
    "traces.sampling.batch_size=32",
    "preset=fast",
)
# What would lead back to the clone or to a compiler.
DROPPED = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "CC", "CXX")
INHERITED = {name: value for name, value in os.environ.items() if name not in DROPPED}
OFFLINE = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
OFFLINE |= {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
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
FAKE_SERVER = ROOT / "tests" / "sampling" / "fake_server.py"
COLLECT = """
import importlib.util
import rac_modifier
absent = ("llmcompressor", "compressed_tensors", "vllm")
assert not any(map(importlib.util.find_spec, absent))
server = FakeServer()
rows = rac_modifier.trace_dataset(
    str(rac_modifier.reasoner_path()), tokens=300, store="traces.jsonl",
    server={"base_urls": [server.url], "verify_model": False}, sampling={"max_new_tokens": 20},
)
tokens = sum(map(len, rows["input_ids"]))
assert tokens >= 300
print("COLLECTED", tokens, "tokens")
server.close()
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
    """A virtual environment, whose programs are all that is on PATH, for the user of `home`."""

    def __init__(self, folder: Path, home: Path) -> None:
        self.folder, self.home, self.bin = folder, home, folder / "bin"

    def install(self, python: str, package: str) -> None:
        """Make the environment with a package, without a compiler on PATH, and lock it."""
        step(f"{Path(package).name} into {self.folder}, no compiler on PATH")
        subprocess.run([python, "-m", "venv", str(self.folder)], check=True)
        for name in ("pip", package):
            command = [self.bin / "pip", "install", "--quiet", "--upgrade", name]
            subprocess.run(command, env=INHERITED | {"PATH": str(self.bin)}, check=True)
        self.lock()

    def run(self, *command: str, **variables: str) -> str:
        """Return what a program of this environment prints in the user's folder."""
        process = subprocess.run(
            [*(AS_USER if IS_ROOT else ()), str(self.bin / command[0]), *command[1:]],
            env={**INHERITED, "PATH": str(self.bin), "HOME": str(self.home), **variables},
            cwd=self.home,
            capture_output=True,
            text=True,
        )
        if process.returncode:
            sys.exit(
                f"{' '.join(command)[:200]}\nfailed:\n"
                f"{process.stdout[-3000:]}\n{process.stderr[-5000:]}"
            )
        return process.stdout + process.stderr

    def lock(self) -> None:
        """Check that the user cannot write to the packages; `nobody` cannot, as root owns them."""
        if not IS_ROOT:
            subprocess.run(["chmod", "-R", "a-w", str(self.folder)], check=True)
        self.python("import os, pip; assert not os.access(pip.__file__, os.W_OK)")

    def python(self, code: str, *args: str, **variables: str) -> str:
        """Return what a script prints; a file, because vLLM starts processes that import it."""
        file = self.home / "program.py"
        file.write_text(code)
        return self.run("python", str(file), *args, **OFFLINE, **variables)


def main() -> None:
    """Run all steps; the first that fails ends the script with exit code 1."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dist", type=Path, help="folder with the wheel")
    parser.add_argument("--python", default=sys.executable, help="one that the user may run")
    parser.add_argument("--skip-serving", action="store_true", help="leave out step 3")
    args = parser.parse_args()
    (wheel,) = args.dist.resolve().glob("*.whl")
    with tempfile.TemporaryDirectory(prefix="rac dist ") as name:
        home = Path(name) / "home"
        home.mkdir()
        Path(name).chmod(0o755)
        if IS_ROOT:
            os.chown(home, NOBODY, NOBODY)
        compress(Environment(Path(name) / "compress", home), args.python, wheel)
        if not args.skip_serving:
            serve(Environment(Path(name) / "serving", home), args.python, wheel)
        collect(Environment(Path(name) / "traces", home), args.python, wheel)
    step("all steps passed")


def compress(environment: Environment, python: str, wheel: Path) -> None:
    """Run steps 1 and 2."""
    environment.install(python, f"{wheel}[compress]")
    step("rac recipes")
    print(environment.run("rac", "recipes").splitlines()[0])
    settings = [argument for setting in SETTINGS for argument in ("--set", setting)]
    step("rac prune reasoner 'out put' --recipe rac_2of4")
    options = ["--recipe", "rac_2of4", "--precision", "float32", *settings]
    pruned = environment.run("rac", "prune", "reasoner", "out put", *options, **OFFLINE)
    print(pruned.splitlines()[-1])
    step("rac inspect 'out put', load_model, from_pretrained, rac_modifier.recipe")
    print(environment.run("rac", "inspect", "out put").strip().splitlines()[-1])
    environment.python(LOAD, "out put")
    step("the compiled kernel")
    print(environment.python(KERNEL), end="")


def serve(environment: Environment, python: str, wheel: Path) -> None:
    """Run step 3."""
    step(f"{wheel.name} and vLLM for a CPU into {environment.folder}; serve the checkpoint")
    variables = {"PYTHON": python, "PACKAGE": str(wheel)}
    script = [str(ROOT / "scripts" / "serve_cpu_env.sh"), str(environment.folder)]
    subprocess.run(script, env=INHERITED | variables, cwd=environment.home, check=True)
    environment.lock()
    print(environment.python(KERNEL), end="")
    path = f"{environment.bin}{os.pathsep}{os.environ['PATH']}"
    output = environment.python(SERVE, "out put", PATH=path)
    print(*[line for line in output.splitlines() if "rac:" in line or "SERVED" in line], sep="\n")
    if not ("SERVED" in output and "compressed layers run on a kernel" in output):
        sys.exit(f"vLLM did not log that it uses a sparse kernel:\n{output[-5000:]}")


def collect(environment: Environment, python: str, wheel: Path) -> None:
    """Run step 4."""
    environment.install(python, f"{wheel}[traces]")
    output = environment.python(FAKE_SERVER.read_text() + COLLECT)
    print(*[line for line in output.splitlines() if "COLLECTED" in line])


def step(text: str) -> None:
    """Print what comes next, and the time."""
    print(f"== {time.strftime('%H:%M:%S')} {text}", flush=True)


if __name__ == "__main__":
    main()
