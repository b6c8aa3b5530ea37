"""What matters in a reasoning-aware calibration set, one change at a time: the table in docs/results/traces.md.

    python benchmarks/ablations.py                 # hours on one core; goes on from its rows
    python benchmarks/ablations.py --problems 0    # without accuracy: a quarter of the time
    python benchmarks/ablations.py --report-only   # the table from the rows that are there

Each run prunes the embedded reasoner through `oneshot` with one setting changed, then measures the loss per token on the dense
model's own held-out samples, and greedy accuracy on held-out problems. A calibration seed changes the choice among the traces of
one store; the same seeds are used for every change, so differences are also shown within a seed. The store is sampled here,
unless --store names one of the reasoner's that holds 140,000 tokens and more, such as trace_speed.py leaves.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from common import fresh, machine
from llmcompressor import oneshot
from seeds import parse_sparsity
from trace_loss import trace_loss
from transformers import AutoTokenizer

import rac_modifier
from rac_modifier.calibration.calibration_set import CalibrationSet, build_calibration_set
from rac_modifier.calibration.loader import CalibrationLoader
from rac_modifier.calibration.mixture import CalibrationSequence, compose
from rac_modifier.evaluation.accuracy import evaluate
from rac_modifier.evaluation.own_samples import sample_sequences
from rac_modifier.problems import arithmetic as tasks
from rac_modifier.problems.held_out import held_out_problems
from rac_modifier.sampling.prompts import render_prompt
from rac_modifier.settings.calibration import CalibrationSettings
from rac_modifier.settings.sampling import SamplingSettings
from rac_modifier.settings.traces import TraceSettings
from rac_modifier.traces.collect import collect_traces

BASE = "baseline"
TOKENS = 32_768
HELD_OUT = 100  # samples that the loss is measured on


@dataclass(frozen=True)
class Change:
    """What one row does differently from the baseline."""

    says: str
    calibration: dict[str, Any] = field(default_factory=dict)
    traces: dict[str, Any] = field(default_factory=dict)
    sequences: Callable[[Setup, list[CalibrationSequence]], list[CalibrationSequence]] | None = None
    store: str = "own"


@dataclass(frozen=True)
class Setup:
    """What a change may need: the tokenizer, a calibration seed, the budget."""

    tokenizer: Any
    seed: int
    tokens: int


def without_eos(setup: Setup, sequences: list[CalibrationSequence]) -> list[CalibrationSequence]:
    """As traces come back from text that was decoded without special tokens."""
    eos = setup.tokenizer.eos_token_id
    return [replace(s, ids=s.ids[:-1]) if s.ids[-1] == eos else s for s in sequences]


def worked_solutions(
    setup: Setup, _sequences: list[CalibrationSequence]
) -> list[CalibrationSequence]:
    """The solutions that the model learned from, written by a program, in place of what it writes itself."""
    chosen, left = [], setup.tokens
    for solved in tasks.generate(f"solutions-{setup.seed}", "calibration"):
        prompt = render_prompt(setup.tokenizer, solved.question)
        text = f"{solved.thinking}\n</think>\n\\boxed{{{solved.answer}}}{setup.tokenizer.eos_token}"
        ids = (*prompt, *setup.tokenizer(text, add_special_tokens=False)["input_ids"])
        chosen.append(CalibrationSequence(tuple(ids), len(prompt), "traces"))
        left -= len(ids)
        if left <= 0:
            break
    chosen[-1] = chosen[-1].cut(len(chosen[-1].ids) + left)
    random.Random(setup.seed).shuffle(chosen)
    return chosen


CHANGES = {
    BASE: Change("own traces, 32,768 tokens, every token weighs 1"),
    "eos lost": Change("the EOS of each trace left out", sequences=without_eos),
    "decode only": Change("prompt tokens weigh 0", calibration={"prompt_weight": 0.0}),
    "prompts 25 %": Change(
        "a quarter of the budget in bare prompts", {"mixture": {"traces": 0.75, "prompts": 0.25}}
    ),
    "prompts 50 %": Change("half of it", {"mixture": {"traces": 0.5, "prompts": 0.5}}),
    "prompts 75 %": Change("three quarters of it", {"mixture": {"traces": 0.25, "prompts": 0.75}}),
    "text 25 %": Change(
        "a quarter in generic text", {"mixture": {"traces": 0.75, "generic": 0.25}}
    ),
    "correct only": Change(
        "wrong and unfinished answers passed over", traces={"select": {"answers": "correct"}}
    ),
    "4k tokens": Change("an eighth of the budget", {"tokens": 4096}),
    "8k tokens": Change("a quarter of it", {"tokens": 8192}),
    "16k tokens": Change("half of it", {"tokens": 16384}),
    "64k tokens": Change("twice the budget", {"tokens": 65536}),
    "128k tokens": Change("four times the budget", {"tokens": 131072}),
    "pruned model's traces": Change("written by a 2:4 copy that gets a third right", store="other"),
    "worked solutions": Change(
        "the program's solutions that it learned from", sequences=worked_solutions
    ),
}


SAMPLING = SamplingSettings(
    temperature=0.6, top_p=0.95, top_k=0, max_new_tokens=512, batch_size=128
)


def calibration_set(change: Change, seed: int, folder: Path, tokenizer: Any) -> CalibrationSet:
    settings = CalibrationSettings(**{"tokens": TOKENS, **change.calibration, "seed": seed})
    traces = TraceSettings(
        store=str(folder / f"{change.store}.jsonl"),
        sampling=SAMPLING,
        allow_off_policy=change.store != "own",
        **change.traces,
    )
    built = build_calibration_set(
        fresh(rac_modifier.reasoner_path()), tokenizer, traces, settings, progress=False
    )
    if change.sequences is None:
        return built
    sequences = change.sequences(Setup(tokenizer, seed, settings.tokens), built.loader.sequences)
    loader = CalibrationLoader(sequences, compose(sequences), settings, tokenizer.pad_token_id)
    return CalibrationSet(loader, built.pools)


def collect_of_another(path: Path, tokenizer: Any) -> None:
    """Traces of a copy that was pruned at 2:4 on generic text."""
    model = fresh(rac_modifier.reasoner_path())
    prune(model, "2:4", "paper", calibration={"tokens": TOKENS, "mixture": {"generic": 1.0}})
    collect_traces(
        model,
        tokenizer,
        path,
        problems=TraceSettings().problems,
        sampling=SAMPLING,
        tokens=2 * TOKENS,
        progress=False,
    )


def prune(
    model: Any,
    pattern: str | float,
    preset: str,
    built: CalibrationSet | None = None,
    **settings: Any,
) -> None:
    modifier = rac_modifier.ReasoningAwareSparseGPTModifier(
        preset=preset,
        **({"mask_structure": pattern} if isinstance(pattern, str) else {"sparsity": pattern}),
        **settings,
    )
    if built is not None:
        modifier.use_calibration_set(built)
    oneshot(model=model, recipe=modifier)


def run(args: argparse.Namespace, rows_path: Path) -> None:
    path = rac_modifier.reasoner_path()
    tokenizer = AutoTokenizer.from_pretrained(path)
    problems = held_out_problems("arithmetic", args.problems) if args.problems else []
    held_out = sample_sequences(
        fresh(path),
        tokenizer,
        held_out_problems("arithmetic", HELD_OUT, seed=1),
        SamplingSettings(temperature=0, max_new_tokens=512, batch_size=HELD_OUT),
        progress=False,
    )
    done = {
        (r["pattern"], r["change"], r["calibration_seed"], r["preset"])
        for r in read(args.out)
        if "accuracy" in r or not problems
    }
    if args.store and not (args.out / "own.jsonl").exists():
        shutil.copy(args.store, args.out / "own.jsonl")
    cells = itertools.product(args.seeds, args.patterns, args.changes)
    for seed, pattern, name in cells:
        if (pattern, name, seed, args.preset) in done:
            continue
        change = CHANGES[name]
        other = args.out / "other.jsonl"
        if change.store == "other" and not other.exists():
            collect_of_another(other, tokenizer)
        built = calibration_set(change, seed, args.out, tokenizer)
        model = fresh(path)
        started = time.monotonic()
        prune(model, pattern, args.preset, built)
        seconds = time.monotonic() - started
        row = {
            "pattern": pattern,
            "change": name,
            "preset": args.preset,
            "prune_seconds": seconds,
            "loss": trace_loss(model, held_out),
            "calibration": built.as_dict()["calibration"],
            "calibration_seed": seed,
        }
        if problems:
            options = {"max_new_tokens": 512, "batch_size": args.batch_size, "progress": False}
            row |= evaluate(model, tokenizer, problems, label=name, **options).as_dict()
        with rows_path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(
            f"{pattern!s:>4} {name}, seed {seed}: loss {row['loss']:.4f}, {row.get('accuracy', '-')}",
            flush=True,
        )


def read(folder: Path) -> list[dict]:
    return [
        json.loads(line)
        for path in sorted(folder.glob("rows*.jsonl"))
        for line in path.read_text().splitlines()
    ]


def report(rows: list[dict]) -> None:
    """For each change and pattern: means with their range over the seeds, and the difference to the baseline in the same seed."""
    found: dict[tuple[str | float, str], dict[int, dict]] = {}
    for row in rows:
        seeds = found.setdefault((row["pattern"], row["change"]), {})
        seeds[row["calibration_seed"]] = {**seeds.get(row["calibration_seed"], {}), **row}
    for pattern in dict.fromkeys(pattern for pattern, _ in found):
        base = found.get((pattern, BASE), {})
        name = pattern if isinstance(pattern, str) else f"{pattern:.0%}"
        print(
            f"\n| {name} | loss | to the baseline | seeds | accuracy | unfinished | seeds |\n|"
            + "---|" * 7
        )
        for change in CHANGES:
            if not (seeds := found.get((pattern, change))):
                continue
            cells = [
                spread([r["loss"] for r in seeds.values()], "{:.4f}"),
                difference(seeds, base),
                str(len(seeds)),
            ]
            answered = [r for r in seeds.values() if "accuracy" in r]
            cells += [
                spread([100 * r["accuracy"] for r in answered], "{:.1f}") if answered else "-",
                f"{100 * statistics.mean(r['unfinished_share'] for r in answered):.1f}"
                if answered
                else "-",
                str(len(answered)),
            ]
            print(f"| {change} | {' | '.join(cells)} |")


def spread(values: list[float], form: str) -> str:
    return f"{form.format(statistics.mean(values))} ({form.format(min(values))} to {form.format(max(values))})"


def difference(seeds: dict[int, dict], base: dict[int, dict]) -> str:
    """Of the loss, in percent of the baseline's with the same seed."""
    both = [100 * (seeds[s]["loss"] / base[s]["loss"] - 1) for s in seeds if s in base]
    return spread(both, "{:+.1f}%") if both and seeds is not base else "-"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("build/ablations"))
    parser.add_argument(
        "--problems", type=int, default=200, help="to measure accuracy on; 0 leaves it out"
    )
    parser.add_argument("--store", type=Path, help="traces of the reasoner to begin with")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--patterns", type=parse_sparsity, nargs="+", default=["2:4", 0.6])
    parser.add_argument("--changes", choices=CHANGES, nargs="+", default=list(CHANGES))
    parser.add_argument("--preset", choices=["paper", "fast", "quality"], default="paper")
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--report-only", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    print(machine(), flush=True)
    if not args.report_only:
        run(args, args.out / "rows.jsonl")
    report(read(args.out))


if __name__ == "__main__":
    main()
