"""End-to-end speed of `vllm serve`: a model of the shape of Qwen2-1.5B, dense against packed sparse, in the same vLLM.

    .venv-serve/bin/python benchmarks/serving_speed.py                                       # about an hour on two AVX2 cores
    .venv-serve/bin/python benchmarks/serving_speed.py --sparsity 0.5 0.6 0.7 2:4
    .venv-serve/bin/python benchmarks/serving_speed.py --compare dense dense-int8 dense-int4 int8 int8-8
    .venv-serve/bin/python benchmarks/serving_speed.py --concurrency 16 --first-token 512 2048  # long prompts, one at a time
    .venv-serve/bin/python benchmarks/serving_speed.py --layers 2 --vocab 4096 --rounds 1    # a quick test: minutes

Each round starts a new server for each model, in reverse order in every second round. A server is warmed up and then gets
prompts of random token ids at each concurrency: every request has `--prompt-tokens` in and exactly `--output-tokens` out,
and no prompt is in a prefix cache. The tables show medians over the rounds; a ratio is the median of the rounds' own ratios
to the first model of the table. Tokens per second include the time for prompts, "each further" does not. With --first-token,
single requests with prompts of these lengths follow, and a table of their times to the first token.
In --compare "dense" and "dense-int8" are vLLM's own bfloat16 and W8A8, all others run on our kernels; a name that ends in -8 has
activations of 8 bits, others of 16; where weights have 8 bits the head has, too, and 4 where they have fewer.
Other options, such as --enforce-eager, are passed to `vllm serve`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from common import machine
from random_model import save_model, size_on_disk
from streaming_client import Load, Speed, measure
from vllm_server import busy_seconds, serving

from rac_modifier.errors import RacError
from rac_modifier.settings.pattern import Pattern

NAME = "model"
FEWEST = 4  # requests, so that the median time to the first token means something


@dataclass(frozen=True)
class Kind:
    """What --compare names: weights of 16 or fewer bits, on our kernels or vLLM's own. Heads are rounded on our kernels alone."""

    sparse: bool = False
    bits: int = 16
    ours: bool = True
    activations: int = 16

    @property
    def name(self) -> str:
        """As tables have it, without the sparsity."""
        bits = "" if self.bits == 16 else f" int{self.bits}"
        owner = ", ours" if self.ours and not self.sparse and self.bits < 16 else ""
        return f"{bits}{owner}{', activations int8' if self.activations == 8 else ''}"

    @property
    def environment(self) -> dict[str, str]:
        """Of its server."""
        if not self.ours or self.bits == 16:
            return {}
        head = {"RAC_LM_HEAD": "int8" if self.bits == 8 else "int4"}
        return head | ({"RAC_ACTIVATIONS": "int8"} if self.activations == 8 else {})

    @property
    def options(self) -> list[str]:
        """Of `vllm serve`: a dense checkpoint of few bits is on our kernels where that is asked for."""
        return ["--quantization", "rac"] if self.ours and not self.sparse and self.bits < 16 else []


KINDS = {
    "dense": Kind(ours=False),
    "dense-int8": Kind(bits=8, ours=False),
    "dense-int4": Kind(bits=4),
    "dense-int4-8": Kind(bits=4, activations=8),
    "dense-int3": Kind(bits=3),
    "dense-int3-8": Kind(bits=3, activations=8),
    "sparse": Kind(sparse=True),
    "int8": Kind(sparse=True, bits=8),
    "int8-8": Kind(sparse=True, bits=8, activations=8),
    "int4": Kind(sparse=True, bits=4),
    "int4-8": Kind(sparse=True, bits=4, activations=8),
}


@dataclass(frozen=True)
class Run:
    """The figures of one server. `others`: the number of cores that other programs kept busy at the same time."""

    ready_seconds: float
    resident_bytes: int
    others: float
    speeds: dict[int, Speed]
    first_token_ms: dict[int, float]  # by tokens of the prompt


def default_dtype() -> str:
    """bfloat16 where the processor multiplies it, else float32."""
    flags = next(
        line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")
    ).split()
    return "bfloat16" if {"avx512_bf16", "amx_bf16"} & set(flags) else "float32"


def parse_pattern(text: str) -> Pattern:
    """ "0.5" or "2:4"."""
    try:
        return Pattern.parse(text, None) if ":" in text else Pattern.parse("0:0", float(text))
    except (RacError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def label(pattern: Pattern) -> str:
    return (
        f"{pattern.n}:{pattern.m} sparse"
        if pattern.is_structured
        else f"{100 * pattern.sparsity:g}% sparse"
    )


@dataclass(frozen=True)
class Contender:
    """A checkpoint and how it is served."""

    checkpoint: Path
    kind: Kind


def build(folder: Path, args: argparse.Namespace) -> dict[str, Contender]:
    """The checkpoints to compare, by label. Ratios are to the first one."""
    found = {}
    for kind in (KINDS[name] for name in args.compare):
        for pattern in args.sparsity if kind.sparse else [None]:
            start = "dense" if pattern is None else label(pattern)
            stored = f"{start} int{kind.bits}" if kind.bits < 16 else start
            slug = stored.replace(" ", "-").replace("%", "").replace(":", "of")
            checkpoint = folder / f"{slug}-{args.layers}-layers-{args.vocab}-vocab"
            codes = kind.bits if kind.bits < 8 else None
            save_model(
                checkpoint, args.layers, args.vocab, pattern, int8=kind.bits == 8, codes=codes
            )
            found[f"{start}{kind.name}"] = Contender(checkpoint, kind)
    return found


def run(contender: Contender, args: argparse.Namespace, options: list[str], log: Path) -> Run:
    """Start a server, measure it, stop it."""
    load, kind = Load(args.prompt_tokens, args.output_tokens, args.vocab, NAME), contender.kind
    with serving(
        contender.checkpoint, [*options, *kind.options], log, environment=kind.environment
    ) as server:
        resident = server.resident()
        warm_up = replace(load, output_tokens=min(8, load.output_tokens))
        measure(server.url, warm_up, max(args.concurrency), max(args.concurrency))
        started, others = (
            time.perf_counter(),
            busy_seconds() - server.cpu_seconds() - time.process_time(),
        )
        speeds = {
            c: measure(server.url, load, c, max(c * args.waves, FEWEST)) for c in args.concurrency
        }
        prompts = {n: replace(load, prompt_tokens=n, output_tokens=2) for n in args.first_token}
        first_token = {
            n: measure(server.url, prompt, 1, FEWEST).first_token_ms
            for n, prompt in prompts.items()
        }
        others = busy_seconds() - server.cpu_seconds() - time.process_time() - others
        others /= time.perf_counter() - started
    return Run(server.ready_seconds, resident, max(others, 0.0), speeds, first_token)


def comparison(figures: dict[str, list[float]], name: str, form: str) -> list[str]:
    """Two cells for one model: the median over the rounds, and the median of the rounds' ratios with their range."""
    first = next(iter(figures.values()))
    ratios = [a / b for a, b in zip(figures[name], first, strict=True)]
    spread = f" ({min(ratios):.2f}-{max(ratios):.2f})" if max(ratios) > min(ratios) else ""
    return [
        form.format(statistics.median(figures[name])),
        f"{statistics.median(ratios):.2f}x{spread}",
    ]


def speed_table(runs: dict[str, list[Run]], concurrency: list[int]) -> list[str]:
    columns = (
        ("tokens_per_second", "{:.2f}"),
        ("first_token_ms", "{:,.0f}"),
        ("each_token_ms", "{:.1f}"),
    )
    lines = [
        "| concurrency | model | output tokens/s | ratio | first token ms | ratio | each further ms | ratio |"
    ]
    lines.append("|" + "---|" * 8)
    for c in concurrency:
        for name in runs:
            cells = [str(c), name]
            for field, form in columns:
                figures = {of: [getattr(run.speeds[c], field) for run in runs[of]] for of in runs}
                cells += comparison(figures, name, form)
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def first_token_table(runs: dict[str, list[Run]], lengths: list[int]) -> list[str]:
    lines = ["| tokens of the prompt | model | first token ms | ratio |", "|" + "---|" * 4]
    for length in lengths:
        figures = {name: [run.first_token_ms[length] for run in of] for name, of in runs.items()}
        lines += [
            "| " + " | ".join([f"{length:,}", name, *comparison(figures, name, "{:,.0f}")]) + " |"
            for name in runs
        ]
    return lines


def size_table(runs: dict[str, list[Run]], contenders: dict[str, Contender]) -> list[str]:
    lines = [
        "| model | on disk GB | ratio | resident GB | ratio | start to ready s | ratio |",
        "|" + "---|" * 7,
    ]
    disk = {
        name: [size_on_disk(contender.checkpoint) / 1e9] for name, contender in contenders.items()
    }
    resident = {name: [run.resident_bytes / 1e9 for run in of] for name, of in runs.items()}
    ready = {name: [run.ready_seconds for run in of] for name, of in runs.items()}
    for name in runs:
        cells = (
            comparison(disk, name, "{:.3f}")
            + comparison(resident, name, "{:.2f}")
            + comparison(ready, name, "{:.1f}")
        )
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return lines


def kernel_lines(log: Path) -> list[str]:
    """What the plugin says of its choices, once."""
    marks = ("rac:", "sparse kernel", "int8 kernel", "dense because")
    lines = [line.partition("] ")[2] for line in log.read_text(errors="replace").splitlines()]
    return list(dict.fromkeys(line for line in lines if any(mark in line for mark in marks)))


def compare(folder: Path, args: argparse.Namespace, serve_options: list[str]) -> None:
    """Build, measure in turn, print the tables."""
    length = max(args.prompt_tokens + args.output_tokens, *(n + 2 for n in args.first_token), 0)
    options = [
        "--served-model-name",
        NAME,
        "--dtype",
        args.dtype,
        "--skip-tokenizer-init",
        "--max-model-len",
        str(length),
    ]
    options += ["--no-enable-prefix-caching", "--gpu-memory-utilization", "0.3", *serve_options]
    contenders = build(folder, args)
    runs: dict[str, list[Run]] = {name: [] for name in contenders}
    for index in range(args.rounds):
        for name in list(contenders)[:: 1 if index % 2 == 0 else -1]:
            started, log = time.monotonic(), folder / f"{contenders[name].checkpoint.name}.log"
            runs[name].append(run(contenders[name], args, options, log))
            took, others = time.monotonic() - started, runs[name][-1].others
            print(
                f"round {index + 1}: {name} took {took:.0f} s, other programs kept {others:.2f} cores busy",
                flush=True,
            )
            if not index:
                print("\n".join(kernel_lines(log)), flush=True)
    loads = [run.others for of in runs.values() for run in of]
    print(
        f"\n{args.layers} layers of Qwen2-1.5B's shape, vocabulary {args.vocab:,}, served in {args.dtype}; "
        f"{args.prompt_tokens} tokens in, {args.output_tokens} out; {args.rounds} rounds; "
        f"other programs kept {min(loads):.2f}-{max(loads):.2f} of {os.cpu_count()} cores busy\n"
    )
    print("\n".join(speed_table(runs, args.concurrency)) + "\n")
    if args.first_token:
        print("\n".join(first_token_table(runs, args.first_token)) + "\n")
    print("\n".join(size_table(runs, contenders)))
    if args.json:
        record = {
            "machine": machine(),
            "settings": {key: str(value) for key, value in vars(args).items()}
            | {"serve_options": options},
            "bytes_on_disk": {
                name: size_on_disk(contender.checkpoint) for name, contender in contenders.items()
            },
            "runs": {name: [asdict(run) for run in of] for name, of in runs.items()},
        }
        args.json.write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--compare", choices=tuple(KINDS), nargs="+", default=["dense", "sparse"])
    parser.add_argument(
        "--sparsity",
        type=parse_pattern,
        nargs="+",
        default=[Pattern.unstructured(0.5)],
        help="shares, or N:M",
    )
    parser.add_argument(
        "--dtype", default=default_dtype(), help="to serve in (here: %(default)s); on disk bfloat16"
    )
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument(
        "--waves", type=int, default=2, help=f"requests = waves x concurrency, {FEWEST} at least"
    )
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=64, help="at least 2")
    parser.add_argument(
        "--first-token", type=int, nargs="+", default=[], help="lengths of prompts, one at a time"
    )
    parser.add_argument(
        "--keep", type=Path, help="folder for checkpoints and logs, used again where they exist"
    )
    parser.add_argument("--json", type=Path, help="write every run's figures there")
    args, serve_options = parser.parse_known_args()
    if (
        args.output_tokens < 2
        or min(args.rounds, args.waves, *args.concurrency, *args.first_token) < 1
    ):
        parser.error("--output-tokens must be at least 2, and the other numbers at least 1")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the server is stopped as well
    print(machine(), flush=True)
    if args.keep:
        args.keep.mkdir(parents=True, exist_ok=True)
        compare(args.keep, args, serve_options)
        return
    with tempfile.TemporaryDirectory() as folder:
        compare(Path(folder), args, serve_options)


if __name__ == "__main__":
    main()
