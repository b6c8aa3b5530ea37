"""One small model served by vLLM twice, on the kernels and dense: the same tokens, and log-probabilities within rounding.

    python benchmarks/gpu_served.py                 (with a GPU, in the environment that has vLLM; part of `make gpu-check`)
    python benchmarks/gpu_served.py --device cpu    (the same comparison for the CPU kernels)

Random weights in the widths of Qwen2-1.5B, two layers: 2:4 + int4; with --all also 2:4 in bfloat16, and half of any pattern.
Prompts of 24 tokens are read in one step, and tokens are then sampled greedily one by one, out of CUDA graphs; both go through
the kernels, which take at least 128 tokens. Each engine is a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rac_modifier.errors import RacError
from rac_modifier.files import write_json_atomic

# By device: the variable that chooses kernels, with its values for kernels and for dense layers.
VARIABLES = {"cuda": ("RAC_GPU_KERNELS", "all", "off"), "cpu": ("RAC_KERNEL", "", "off")}
MODELS = {
    "2:4 + int4": (True, True),
    "2:4": (True, False),
    "unstructured": (False, False),
}  # 2:4 or any pattern; int4
# Rounding to bfloat16 elsewhere moves log-probabilities by 0.006 in the mean and 0.03 at most here (2:4 + int4, the CPU kernel
# and dense); a wrong layer moves all of them by more.
MOST_MEAN, MOST = 0.02, 0.25
PROMPTS, PROMPT_TOKENS, NEW_TOKENS, VOCAB = 8, 24, 24, 1024
Sampled = list[
    dict[str, Any]
]  # per prompt: "read", log-probabilities of its tokens; "tokens", "logprobs" of what was sampled


@dataclass(frozen=True)
class Compared:
    """Of two runs of one model: tokens sampled alike, of how many; the mean and the largest difference of log-probabilities.

    Tokens behind the first one of a prompt that differs are not compared: they follow other texts.
    """

    alike: int
    sampled: int
    mean: float
    largest: float


def compare(kernels: Sampled, dense: Sampled) -> Compared:
    """Compare two runs; their log-probabilities up to and with the first token that differs.

    Raises:
        RacError: they differ by more than rounding does.
    """
    differences: list[float] = []
    alike = sampled = 0
    for ours, theirs in zip(kernels, dense, strict=True):
        differences += [abs(a - b) for a, b in zip(ours["read"], theirs["read"], strict=True)]
        same = next(
            (
                n
                for n, pair in enumerate(zip(ours["tokens"], theirs["tokens"], strict=True))
                if len(set(pair)) > 1
            ),
            None,
        )
        count = len(theirs["tokens"]) if same is None else same
        # where they part, each took its likeliest token: two that are about equally likely
        upto = min(count + 1, len(theirs["tokens"]))
        differences += [
            abs(a - b)
            for a, b in zip(ours["logprobs"][:upto], theirs["logprobs"][:upto], strict=True)
        ]
        alike, sampled = alike + count, sampled + len(theirs["tokens"])
    found = Compared(alike, sampled, sum(differences) / len(differences), max(differences))
    if not (found.mean <= MOST_MEAN and found.largest <= MOST):
        raise RacError(
            f"log-probabilities differ by {found.mean:.3g} in the mean and {found.largest:.3g} at most, where rounding explains "
            f"{MOST_MEAN} and {MOST}; do not use the kernels, and report this"
        )
    return found


def sample(folder: Path, device: str) -> Sampled:
    """What vLLM makes of the prompts in this process, a prompt at a time."""
    import torch
    from vllm import LLM, SamplingParams

    torch.manual_seed(1)
    prompts = torch.randint(0, VOCAB, (PROMPTS, PROMPT_TOKENS)).tolist()
    limits = {
        "gpu_memory_utilization": 0.3,
        "max_model_len": 128,
        "max_num_seqs": 1,
        "skip_tokenizer_init": True,
    }
    eager = {"enforce_eager": device == "cpu", "enable_prefix_caching": False}
    model = LLM(str(folder), dtype="bfloat16", **limits, **eager)
    params = SamplingParams(
        temperature=0,
        max_tokens=NEW_TOKENS,
        ignore_eos=True,
        detokenize=False,
        logprobs=1,
        prompt_logprobs=0,
    )
    found = []
    for prompt in prompts:
        (output,) = model.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
        read = [
            given[token].logprob
            for token, given in zip(prompt[1:], output.prompt_logprobs[1:], strict=True)
        ]
        tokens = list(output.outputs[0].token_ids)
        taken = [
            given[token].logprob
            for token, given in zip(tokens, output.outputs[0].logprobs, strict=True)
        ]
        found.append({"read": read, "tokens": tokens, "logprobs": taken})
    return found


def sample_apart(folder: Path, device: str, kernels: bool) -> Sampled:
    """The same in a process of its own, on the kernels or dense.

    Raises:
        RacError: it failed, or no layer runs on a kernel where kernels were asked for.
    """
    variable, on, off = VARIABLES[device]
    environment = os.environ | {variable: on if kernels else off}
    out = folder.with_name(f"{folder.name}-{'kernels' if kernels else 'dense'}.json")
    command = [
        sys.executable,
        __file__,
        "--device",
        device,
        "--sample",
        str(folder),
        "--out",
        str(out),
    ]
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        raise RacError(
            f"{folder.name}: vLLM failed with {variable}={environment[variable]}:\n{done.stdout[-3000:]}"
        )
    if kernels and "rac: 0 of" in done.stdout:
        raise RacError(f"{folder.name}: no layer runs on a kernel here:\n{done.stdout[-3000:]}")
    return json.loads(out.read_text())


def check(place: Path, device: str, names: Sequence[str], kept: Path | None) -> None:
    """Serve and compare these of `MODELS`; figures by model go to the file `kept`, anew after each one."""
    from random_model import save_model

    from rac_modifier.settings.pattern import Pattern

    found: dict[str, dict[str, float]] = {}
    for name in names:
        two_of_four, int4 = MODELS[name]
        pattern = Pattern.n_of_m(2, 4) if two_of_four else Pattern.unstructured(0.5)
        folder = place / name.replace(":", "of").replace(" + ", "-")
        save_model(folder, layers=2, vocab=VOCAB, pattern=pattern, codes=4 if int4 else None)
        compared = compare(sample_apart(folder, device, True), sample_apart(folder, device, False))
        found[name] = vars(compared)
        if kept is not None:
            write_json_atomic(kept, found)
        print(
            f"{name}: {compared.alike} of {compared.sampled} tokens alike before a prompt's first that differs; "
            f"log-probabilities differ by {compared.mean:.2g} in the mean, {compared.largest:.2g} at most",
            flush=True,
        )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--device", choices=VARIABLES, default="cuda", help="where vLLM runs (cuda)"
    )
    parser.add_argument("--all", action="store_true", help="all models, not the first one alone")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--sample", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    try:
        import vllm  # noqa: F401
    except ImportError as error:
        raise SystemExit(f"vLLM cannot be imported ({error}): no model was served") from error
    if given.sample is not None:
        write_json_atomic(given.out, sample(given.sample, given.device))
        return
    with tempfile.TemporaryDirectory() as place:
        check(
            Path(place), given.device, list(MODELS) if given.all else list(MODELS)[:1], given.json
        )


if __name__ == "__main__":
    try:
        main()
    except RacError as error:
        raise SystemExit(str(error)) from error
