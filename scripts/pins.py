"""Pin what a redesign must not change: python scripts/pins.py write|compare [--served VLLM_PYTHON] [--folder FOLDER].

`write` prunes the embedded reasoner in seven ways on fixed traces, on one thread, and writes the
sha256 of each result; with --served also the tokens that vLLM gives for 8 prompts. `compare` does
the same again with the traces of `write` and prints what differs; status 1 if anything does.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

RECIPES = {  # the first needs the most traces, so that all read the same store
    "80_recovered": ["rac_unstructured_60_recover", "sparsity=0.8", "recover.tokens=16384"],
    "2of4": ["rac_2of4"],
    "50": ["rac_unstructured_50"],
    "2of4_int4": ["rac_2of4_w4a16"],
    "50_int8": ["rac_unstructured_50_w8"],
    "paper": ["rac_2of4", "preset=paper"],
    "int3": ["rac_w3a16"],
}
COMMON = [
    "calibration.tokens=16384",
    "calibration.held_out_tokens=2048",
    "traces.sampling.max_new_tokens=512",
    "traces.sampling.batch_size=64",
]


def sha256(folder: Path) -> str:
    """Hash names, dtypes, shapes and bytes of every tensor of a checkpoint, in the order of names."""
    import torch
    from safetensors import safe_open

    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in sorted(file.keys()):
                tensor = file.get_tensor(name).contiguous()
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def pruned(name: str, store: Path, output: Path) -> str:
    """Run one recipe in a process of its own, and hash its checkpoint."""
    shutil.rmtree(output, ignore_errors=True)
    recipe, *settings = [*RECIPES[name], *COMMON, f"traces.store={store}"]
    command = [sys.executable, "-m", "rac_modifier.cli", "prune", "reasoner", str(output)]
    command += ["--recipe", recipe, "--precision", "float32"]
    command += [word for setting in settings for word in ("--set", setting)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        return f"failed: {done.stderr[-600:]}"
    return sha256(output)


SERVED = """
import json, sys
from vllm import LLM, SamplingParams
llm = LLM(sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=512, max_num_seqs=8,
          gpu_memory_utilization=0.1, **json.loads(sys.argv[2]))
prompts = [f"What is {a} + {b} * {c}?" for a, b, c in zip(range(11, 19), range(21, 29), range(2, 10))]
chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
outputs = llm.chat(chats, SamplingParams(temperature=0, max_tokens=64), use_tqdm=False)
print("TOKENS", json.dumps([list(output.outputs[0].token_ids) for output in outputs]))
"""


def served(python: str, folder: Path, options: dict[str, str]) -> str:
    """Hash the greedy tokens of 8 prompts that vLLM gives for a checkpoint."""
    environment = os.environ | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    command = [python, "-c", SERVED, str(folder), json.dumps(options)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("TOKENS ")]
    if not lines:
        return f"failed: {(done.stdout + done.stderr)[-600:]}"
    return hashlib.sha256(lines[-1].encode()).hexdigest()


def main() -> None:
    """Write or compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=("write", "compare"))
    parser.add_argument("--folder", type=Path, default=Path("build/pins"))
    parser.add_argument("--work", type=Path, help="where checkpoints go (default: the folder)")
    parser.add_argument("--served", metavar="PYTHON", help="the python that has vLLM")
    arguments = parser.parse_args()
    folder, work = arguments.folder, arguments.work or arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "pins.json"
    pins = json.loads(file.read_text()) if file.exists() else {}
    if arguments.action == "compare" and not pins:
        sys.exit(f"{file} is missing; write it first")
    differ = 0
    for name in RECIPES:
        store = work / "traces.jsonl"
        if arguments.action == "compare" and work != folder:  # a copy: a run may append traces
            shutil.copy(folder / "traces.jsonl", store)
        results = {"weights": pruned(name, store, work / name)}
        if arguments.served and not results["weights"].startswith("failed"):
            options = {"quantization": "rac"} if name == "int3" else {}
            results["tokens"] = served(arguments.served, work / name, options)
        for kind, value in results.items():
            same = pins.get(name, {}).get(kind) == value
            differ += not same
            print(f"{name:14} {kind:8} {'same' if same else 'DIFFERS ' + value[-600:]}", flush=True)
        if arguments.action == "write":
            pins.setdefault(name, {}).update(results)
            file.write_text(json.dumps(pins, indent=1))
    sys.exit(1 if differ and arguments.action == "compare" else 0)


if __name__ == "__main__":
    main()
