"""Does training on its own answers mend how a recovered model's answers end? On SmolLM2, at equal numbers of tokens.

    cd build/smollm2-frontier                       # made by smollm2_frontier.py; `frontier` holds the dense model's answers
    rac prune smollm2 recovered --recipe recovered.yaml           # as the last row of smollm2_stopping_grid.yaml
    python ../../benchmarks/on_policy.py smollm2 recovered frontier --tokens 32768

RECOVERED is trained once more, with its mask, loss and rates of `recover:`: on further answers of the dense model, or on answers
that it samples itself, with the dense model's predictions on them (on-policy; ShortOPD, arXiv 2607.13124). Repeated tails are cut
from both. Each model answers the frontier's problems; an answer is cut at the cap, and loops if it was cut while it repeated
itself. A row that is in --out already is not measured again.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import fresh, machine
from frontier_answers import answers_in, read_rows
from recovery_trials import answers, first_tokens, train
from transformers import AutoTokenizer

import rac_modifier  # noqa: F401 - makes packed checkpoints loadable
from rac_modifier.evaluation.divergence import divergence
from rac_modifier.evaluation.own_samples import sample_sequences
from rac_modifier.evaluation.teacher_forcing import TokenSequence
from rac_modifier.frontier.folder import FrontierFolder
from rac_modifier.problems.held_out import held_out_problems
from rac_modifier.problems.source import Problem, load_problems
from rac_modifier.recovery.teacher import LiveTeacher
from rac_modifier.settings.problems import ProblemSource
from rac_modifier.settings.sampling import SamplingSettings
from rac_modifier.traces.selection import repeated_tokens

CAP, BATCH = 1024, 64
ROWS = ("dense", "recovered", "further", "on-policy")


def both_kinds(seed: int) -> Iterator[Problem]:
    """Training prompts: instructions and arithmetic in turn."""
    kinds = [
        load_problems(ProblemSource(source=source), seed)
        for source in ("train.jsonl", "arithmetic")
    ]
    return itertools.chain.from_iterable(zip(*kinds, strict=False))


def endings(sequences: list[TokenSequence], eos: int) -> dict[str, float]:
    """How many answers were cut, how many of these loop, and the mean length of a finished one."""
    completions = [ids[start:] for ids, start in sequences]
    cut = [ids for ids in completions if len(ids) >= CAP and ids[-1] != eos]
    finished = [len(ids) for ids in completions if len(ids) < CAP or ids[-1] == eos]
    return {
        "answers": len(completions),
        "cut": len(cut),
        "looping": sum(repeated_tokens(ids) > 0 for ids in cut),
        "finished_tokens": statistics.mean(finished) if finished else 0.0,
    }


class Measure:
    """What is measured of each model: KL on the dense model's answers, and how its own answers end."""

    def __init__(self, args: argparse.Namespace, dense: Any, tokenizer: Any) -> None:
        folder = FrontierFolder.read(args.frontier)
        evaluation = folder.about["evaluation"]
        self.problems = held_out_problems(
            evaluation["source"], evaluation["problems"], seed=evaluation["seed"]
        )
        self.args, self.dense, self.tokenizer, self.on = (
            args,
            dense,
            tokenizer,
            answers_in(folder, tokenizer),
        )

    def row(self, model: Any, label: str, seconds: float) -> None:
        row: dict[str, Any] = {"label": label, "cpu_seconds": seconds}
        if model is not self.dense:
            row["divergence"] = divergence(
                self.dense, model, self.on, label=label, progress=False
            ).as_dict()
        for temperature in self.args.temperatures:
            sampling = SamplingSettings(
                max_new_tokens=CAP, batch_size=BATCH, seed=1, temperature=temperature
            )
            found = sample_sequences(model, self.tokenizer, self.problems, sampling, progress=False)
            row[f"{temperature:g}"] = endings(found, self.tokenizer.eos_token_id)
        with self.args.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(described(row, self.args.temperatures), flush=True)


def run(args: argparse.Namespace) -> None:
    """Train and measure what has no row yet."""
    done = {row["label"] for row in read_rows(args.out)}
    if done >= set(ROWS):
        return
    dense, model, tokenizer = (
        fresh(args.model),
        fresh(args.recovered),
        AutoTokenizer.from_pretrained(args.model),
    )
    teacher, measure, problems = (
        LiveTeacher(dense),
        Measure(args, dense, tokenizer),
        both_kinds(args.seed + 1000),
    )
    for label, untrained in (("dense", dense), ("recovered", model)):
        if label not in done:
            measure.row(untrained, label, 0.0)
    for number, (label, writer) in enumerate((("further", dense), ("on-policy", model))):
        if label in done:
            continue
        cpu = time.process_time()
        sequences = first_tokens(
            answers(writer, tokenizer, problems, args.seed + number, CAP, BATCH), args.tokens
        )
        trained = copy.deepcopy(model)
        train(trained, teacher, sequences, 0.0, moving=False, step_tokens=512)
        measure.row(trained, label, time.process_time() - cpu)


def described(row: dict[str, Any], temperatures: list[float]) -> str:
    kl = row.get("divergence")
    cells = [row["label"], f"{kl['kl']:.3f} ± {kl['kl_stderr']:.3f}" if kl else "-"]
    for found in (row[f"{temperature:g}"] for temperature in temperatures):
        share = found["cut"] / found["answers"]
        cells += [f"{share:.0%}", str(found["looping"]), f"{found['finished_tokens']:.0f}"]
    return f"| {' | '.join([*cells, format(row['cpu_seconds'], '.0f')])} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("recovered", type=Path, help="a sparse checkpoint that was made from it")
    parser.add_argument("frontier", type=Path)
    parser.add_argument(
        "--tokens", type=int, default=32768, help="of further answers, the dense model's or its own"
    )
    parser.add_argument(
        "--temperatures", type=float, nargs="+", default=[0, 0.6], help="at which it answers"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("on_policy.jsonl"))
    args = parser.parse_args()
    print(machine(), flush=True)
    run(args)
    names = [
        f"{name}, T={t:g}"
        for t in args.temperatures
        for name in ("cut", "of them looping", "finished tokens")
    ]
    print(f"| row | KL | {' | '.join(names)} | CPU s |\n{'|---' * (len(names) + 3)}|")
    for row in read_rows(args.out):
        print(described(row, args.temperatures))


if __name__ == "__main__":
    main()
