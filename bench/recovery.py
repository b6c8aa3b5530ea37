"""Recovery: divergence, accuracy and endings by calibration tokens and recovery tokens.

python -m bench recovery --patterns 0.8 0.9 2:4+int4+paper --recover 0 640000

The model is the embedded reasoner in float32, because a CPU multiplies that faster than bfloat16.
Every checkpoint answers the same held-out problems greedily and at temperature 0.6.
"""

import argparse
import itertools
from typing import Any

from bench.common import save
from bench.grid import COLUMNS, OURS, cells, pattern, run_grid
from bench.models import float32_copy, reasoner
from rac_modifier.evaluation.results import EvalResult

TINY = "--patterns 0.9 --tokens 512 --recover 512 --seeds 0 --problems 2 --cap 24"
STOPPING = {
    "row": "",
    "temperature": "",
    "KL": ".4f",
    "right, %": ".1f",
    "truncated, %": ".1f",
    "looping, %": ".1f",
    "closes thinking, %": ".1f",
    "token inflation": ".2f",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this suite."""
    example = "such as 2:4 or 0.5+int4+paper"
    parser.add_argument("--patterns", nargs="+", default=["0.8", "0.9"], help=example)
    parser.add_argument("--tokens", nargs="+", type=int, default=[32768], help="of calibration")
    parser.add_argument("--recover", nargs="+", type=int, default=[0, 80000], help="0: no recovery")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--problems", type=int, help="held-out problems")
    parser.add_argument("--cap", type=int, help="most new tokens of an answer")


def stopping(measured: dict[str, Any], temperature: str) -> list[Any]:
    """Return the cells of STOPPING for a checkpoint's row at one temperature."""
    result = EvalResult.model_validate(measured["accuracy"])
    shares = result.stopping()
    inflation = (measured["paired"] or {}).get("inflation", {}).get("at_cap")
    label, _, kl, *_ = cells(measured)
    return [
        label,
        temperature,
        kl,
        100 * shares["right"],
        100 * result.unfinished_share,
        100 * shares["looping"],
        100 * shares["closes_thinking"],
        inflation and [inflation[key] for key in ("ratio", "ci_low", "ci_high")],
    ]


def entry_of(text: str) -> dict[str, Any]:
    """Return the settings of "0.9+int4+paper": a pattern, bits in groups of 64, a preset."""
    share, *words = text.split("+")
    entry = pattern(share)
    for word in words:
        if word.startswith("int"):
            weights = {"num_bits": int(word[3:]), "strategy": "group", "group_size": 64}
            entry["quantization"] = {"config_groups": {"w": {"weights": weights}}}
        else:
            entry["preset"] = word
    return entry


def run(options: argparse.Namespace) -> None:
    """Run the rows and write the tables."""
    cap = options.cap or reasoner(options.work).evaluation["cap"]
    subject = float32_copy("reasoner", options.work, cap)
    rows = []
    axes = (options.patterns, options.tokens, options.recover)
    for text, tokens, recover in itertools.product(*axes):
        changes: dict[str, Any] = {"calibration.tokens": tokens}
        if recover:
            changes["recover"] = {"tokens": recover}
        label = f"{text}, {tokens:,} + {recover:,} tokens"
        row = {"label": label, "recipe": {OURS: entry_of(text)}, "set": changes}
        rows.append(row | {"seeds": options.seeds})
    out = options.work / "recovery-reasoner"
    shared: dict[str, Any] = {"tokens": max(options.tokens), "cap": cap}
    shared["problems"] = options.problems
    greedy = run_grid(subject, rows, out / "greedy", **shared, remove_models=False)
    columns = {**COLUMNS, "seconds of compressing": ".0f"}
    table = [[*cells(row), row["compressing"]] for row in greedy]
    save(options.out, "recovery_reasoner", subject.name, columns, table)
    if (models := out / "greedy" / "models").exists():
        (out / "sampled").mkdir(exist_ok=True)
        models.rename(out / "sampled" / "models")  # these are not compressed again
    sampled = run_grid(subject, rows, out / "sampled", **shared, temperature=0.6)
    table = []
    for row, at_temperature in zip(greedy, sampled, strict=True):
        table += [stopping(row, "0"), stopping(at_temperature, "0.6")]
    save(options.out, "stopping_reasoner", subject.name, STOPPING, table)
