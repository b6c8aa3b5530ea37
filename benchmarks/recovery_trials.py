"""Recovery in other ways than the package has, on the embedded reasoner: answers of the pruned model, and a mask that moves.

    python benchmarks/recovery_trials.py                        # all rows; resumes from its rows
    python benchmarks/recovery_trials.py --patterns 0.9 --tokens 80000 320000

Each row starts from the same pruned weights (`quality`, 32,768 calibration tokens) and trains with the package's loss, steps and
rates; only what is named differs:

- fixed: on the dense model's traces, the mask fixed, as `recover:` does. `twice` on as many tokens again, in one schedule.
- on-policy: the same, then as many tokens of the recovered model's own answers, with the dense model's predictions on
  them (ShortOPD, arXiv 2607.13124); tails that repeat are cut.
- moving: with the mask of RigL (arXiv 1911.11134): every tenth step until three quarters of the run, a share of each matrix that
  falls from 10 % to 0 is exchanged: the smallest weights are dropped, those with the largest gradients grow from zero; for N:M
  within groups.

KL is measured on held-out traces of the dense model, accuracy on held-out problems, greedy.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import fresh, machine, modifier
from llmcompressor import oneshot
from seeds import parse_sparsity
from transformers import AutoTokenizer

import rac_modifier
from rac_modifier.evaluation.accuracy import evaluate
from rac_modifier.evaluation.divergence import divergence
from rac_modifier.evaluation.own_samples import sample_sequences
from rac_modifier.evaluation.teacher_forcing import TokenSequence
from rac_modifier.problems.held_out import held_out_problems
from rac_modifier.problems.source import Problem, load_problems
from rac_modifier.recovery.fixed_mask import sparse_masks
from rac_modifier.recovery.hidden_states import output_head, predicting_states
from rac_modifier.recovery.loss import head_kl
from rac_modifier.recovery.schedule import default_learning_rate, plan_steps, rate_at
from rac_modifier.recovery.teacher import LiveTeacher, StoredTeacher
from rac_modifier.settings.problems import ProblemSource
from rac_modifier.settings.sampling import SamplingSettings
from rac_modifier.traces.selection import repeated_tokens

MOVE_EVERY, FIRST_SHARE, LAST_MOVE = 10, 0.1, 0.75
ROWS = ("fixed", "fixed, twice", "on-policy", "moving")


def train(
    model: Any,
    teacher: LiveTeacher | StoredTeacher,
    sequences: list[TokenSequence],
    pattern: str | float,
    *,
    moving: bool,
    step_tokens: int = 2048,
) -> None:
    """One pass over `sequences`; the zeros stay, or move."""
    masks = sparse_masks(model)
    frozen = {id(model.get_input_embeddings().weight), id(output_head(model).weight)}
    parameters = {name: p for name, p in model.named_parameters() if id(p) not in frozen}
    model.requires_grad_(False)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters.values(), lr=1.0, betas=(0.9, 0.95), weight_decay=0.0)
    steps = plan_steps(sequences, step_tokens=step_tokens, batch_tokens=4096, passes=1, seed=0)
    highest = default_learning_rate(sum(p.numel() for p in model.parameters()))
    for number, step in enumerate(steps):
        for group in optimizer.param_groups:
            group["lr"] = highest * rate_at(number, len(steps))
        for batch in step.batches:
            states = predicting_states(model, batch)
            (
                head_kl(states, teacher.states(batch), output_head(model)) / step.completion_tokens
            ).backward()
        done = number / (LAST_MOVE * len(steps))
        if moving and number % MOVE_EVERY == MOVE_EVERY - 1 and done < 1:
            share = FIRST_SHARE * (1 + math.cos(math.pi * done)) / 2
            for name, mask in masks.items():
                masks[name] = moved(parameters[name], mask, pattern, share)
                for moment in ("exp_avg", "exp_avg_sq"):
                    optimizer.state[parameters[name]][moment].mul_(mask & masks[name])
        with torch.no_grad():
            for name, mask in masks.items():
                parameters[name].grad.mul_(mask)
            torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
            optimizer.step()
            for name, mask in masks.items():
                parameters[name].mul_(mask)
        optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def moved(
    weight: torch.Tensor, mask: torch.Tensor, pattern: str | float, share: float
) -> torch.Tensor:
    """The mask with a share of the kept weights exchanged: small ones out, those of large gradient in; as many stay."""
    size, gradient = weight.abs(), weight.grad.abs()
    if isinstance(pattern, str):
        m = int(pattern.partition(":")[2])
        size, gradient, kept = (t.unflatten(1, (-1, m)) for t in (size, gradient, mask))
        least, out = size.masked_fill(~kept, math.inf).min(-1)
        most, come = gradient.masked_fill(kept, -math.inf).max(-1)
        worth = (most / (least + 1e-8)).flatten()
        chosen = torch.zeros_like(worth, dtype=torch.bool)
        chosen[worth.topk(round(share * len(worth))).indices] = True
        chosen = chosen.view_as(least)[..., None]
        hot = torch.nn.functional.one_hot
        new = (kept & ~(chosen & hot(out, m).bool())) | (chosen & hot(come, m).bool())
        return new.flatten(1)
    count = round(share * int(mask.sum()))
    new = mask.flatten().clone()
    new[size.masked_fill(~mask, math.inf).flatten().topk(count, largest=False).indices] = False
    new[gradient.masked_fill(mask, -math.inf).flatten().topk(count).indices] = True
    return new.view_as(mask)


def without_repeated_tail(ids: tuple[int, ...], start: int) -> tuple[int, ...]:
    """A sequence whose completion ends by repeating itself, cut after the first copy."""
    return ids[: len(ids) - repeated_tokens(ids[start:])]


def first_tokens(sequences: Iterator[TokenSequence], tokens: int) -> list[TokenSequence]:
    chosen, total = [], 0
    while total < tokens:
        chosen.append(next(sequences))
        total += len(chosen[-1][0])
    return chosen


def answers(
    model: Any,
    tokenizer: Any,
    problems: Iterator[Problem],
    seed: int,
    cap: int = 512,
    batch: int = 128,
) -> Iterator[TokenSequence]:
    """Sampled answers to ever new problems, without tails that repeat."""
    sampling = SamplingSettings(max_new_tokens=cap, batch_size=batch, seed=seed)
    while asked := list(itertools.islice(problems, batch)):
        for ids, start in sample_sequences(model, tokenizer, asked, sampling, progress=False):
            yield without_repeated_tail(tuple(ids), start), start


def trial(
    row: str,
    pruned: Any,
    teacher: LiveTeacher,
    traces: list[TokenSequence],
    tokens: int,
    pattern: str | float,
    seed: int,
) -> Any:
    """The model after one row's training."""
    model = copy.deepcopy(pruned)
    count = 2 * tokens if row in ("fixed, twice", "moving, twice") else tokens
    train(
        model, teacher, first_tokens(iter(traces), count), pattern, moving=row.startswith("moving")
    )
    if row == "on-policy":
        tokenizer = AutoTokenizer.from_pretrained(rac_modifier.reasoner_path())
        problems = load_problems(ProblemSource(source="arithmetic"), seed + 2000)
        own = first_tokens(answers(model, tokenizer, problems, seed), tokens)
        train(model, teacher, own, pattern, moving=False)
    return model


def run(args: argparse.Namespace, rows_path: Path) -> None:
    path = rac_modifier.reasoner_path()
    tokenizer = AutoTokenizer.from_pretrained(path)
    dense = fresh(path)
    teacher = LiveTeacher(dense)
    problems = held_out_problems("arithmetic", args.problems)
    sampling = SamplingSettings(max_new_tokens=512, batch_size=100, seed=1)
    held_out = sample_sequences(
        dense, tokenizer, held_out_problems("arithmetic", 100, seed=1), sampling
    )
    done = {row["label"] for row in read(rows_path)}
    for pattern in args.patterns:
        for seed in args.seeds:
            fresh_problems = load_problems(ProblemSource(source="arithmetic"), seed + 1000)
            needed = max(args.tokens) * (2 if any("twice" in row for row in args.rows) else 1)
            traces = first_tokens(answers(dense, tokenizer, fresh_problems, seed), needed)
            pruned = fresh(path)
            store = args.out / f"traces-{seed}.jsonl"
            oneshot(
                model=pruned,
                recipe=modifier(
                    pattern, "RAC", tokens=32768, seed=seed, store=store, variant="quality"
                ),
            )
            for row, tokens in [
                ("not recovered", 0),
                *((row, n) for n in args.tokens for row in args.rows),
            ]:
                label = f"{pattern if isinstance(pattern, str) else f'{pattern:.0%}'}, {row}, {tokens:,} tokens, seed {seed}"
                if label in done:
                    continue
                started = time.process_time()
                model = (
                    trial(row, pruned, teacher, traces, tokens, pattern, seed) if tokens else pruned
                )
                spent = time.process_time() - started
                kl = divergence(dense, model, held_out, label=label, progress=False)
                found = evaluate(
                    model,
                    tokenizer,
                    problems,
                    label=label,
                    max_new_tokens=512,
                    batch_size=100,
                    progress=False,
                )
                values = {
                    "label": label,
                    "cpu_seconds": spent,
                    "kl": kl.as_dict(),
                    "accuracy": found.as_dict(),
                }
                with rows_path.open("a") as file:
                    file.write(json.dumps(values) + "\n")
                print(described(values), flush=True)


def described(row: dict[str, Any]) -> str:
    found = row["accuracy"]
    return (
        f"| {row['label']} | {row['kl']['kl']:.4f} ± {row['kl']['kl_stderr']:.4f} | {found['accuracy']:.1%} | "
        f"{found['unfinished_share']:.1%} | {found['mean_thinking_tokens']:.0f} | {row['cpu_seconds']:.0f} |"
    )


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("build/recovery_trials"))
    parser.add_argument("--patterns", type=parse_sparsity, nargs="+", default=[0.9, "2:4"])
    parser.add_argument(
        "--tokens",
        type=int,
        nargs="+",
        default=[80_000],
        help="of training; on-policy rows take twice",
    )
    parser.add_argument("--rows", nargs="+", choices=[*ROWS, "moving, twice"], default=list(ROWS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--problems", type=int, default=300)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    print(machine(), flush=True)
    rows_path = args.out / "rows.jsonl"
    run(args, rows_path)
    print(
        "| row | held-out KL | accuracy | unfinished | thinking tokens | CPU s |\n|---|---|---|---|---|---|"
    )
    for row in read(rows_path):
        print(described(row))


if __name__ == "__main__":
    main()
