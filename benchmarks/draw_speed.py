"""How long drawing the next tokens takes, beside transformers' warpers with noise for the whole vocabulary (the same tokens).

python benchmarks/draw_speed.py                 # one core, medians, in turn
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from common import machine
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from rac_modifier.sampling.draw import Draw, gumbel_noise, row_keys

TEMPERATURE, TOP_P = 0.6, 0.95


def measure(rows: int, vocabulary: int, rounds: int) -> tuple[float, float]:
    """Milliseconds per step of both ways, medians over `rounds`, in turn; refuses to compare unequal tokens."""
    keys = row_keys(0, [str(row) for row in range(rows)])
    logits = 3.0 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(0))
    warpers = LogitsProcessorList([TemperatureLogitsWarper(TEMPERATURE), TopPLogitsWarper(TOP_P)])
    no_ids, all_ids = torch.zeros(rows, 1, dtype=torch.int64), torch.arange(vocabulary)
    draw = Draw(TEMPERATURE, 0, TOP_P)

    def whole() -> torch.Tensor:
        scores: torch.Tensor = warpers(no_ids, logits.clone())  # type: ignore[arg-type]
        return (scores + gumbel_noise(keys, 3, all_ids)).argmax(-1)

    def ours() -> torch.Tensor:
        return draw.tokens(logits, keys, 3)

    if not torch.equal(whole(), ours()):
        raise SystemExit("the two ways draw different tokens")
    ways: list[Callable[[], torch.Tensor]] = [whole, ours]
    times: list[list[float]] = [[], []]
    for _ in range(rounds):
        for way, seconds in zip(ways, times, strict=True):
            started = time.perf_counter()
            way()
            seconds.append(time.perf_counter() - started)
    return 1000 * statistics.median(times[0]), 1000 * statistics.median(times[1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[49_152, 151_936])
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(machine())
    print("| vocabulary | rows | whole vocabulary, ms | ours, ms | ratio |\n|---|---|---|---|---|")
    for vocabulary in args.vocabularies:
        whole, ours = measure(args.rows, vocabulary, args.rounds)
        print(f"| {vocabulary:,} | {args.rows} | {whole:.0f} | {ours:.0f} | {whole / ours:.1f} |")


if __name__ == "__main__":
    main()
