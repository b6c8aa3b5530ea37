"""Time per decoding step with transformers' attention and key-value cache and with ours, in turn, in one process.

python benchmarks/decode_speed.py --model MODEL --rows 32 --length 400      # a folder or id with grouped-query attention
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time

import torch
from common import fresh, machine
from transformers import DynamicCache

from rac_modifier.cli.models import resolve
from rac_modifier.sampling.decode import grouped_attention, roomy_cache

STEPS = 8


@torch.no_grad()
def step_ms(
    model: torch.nn.Module, rows: int, length: int, attention: bool, cache_too: bool
) -> float:
    """The median time of a step behind `length` tokens; the first row is padded, as in sampling."""
    ids = torch.randint(5, 1000, (rows, length), generator=torch.Generator().manual_seed(0))
    ids %= model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    mask = torch.ones(rows, length, dtype=torch.int64)
    mask[0, :5] = 0
    made = roomy_cache if cache_too else lambda config: DynamicCache(config=config)
    cache, seconds = made(model.config), []  # type: ignore[arg-type]
    with grouped_attention(model) if attention else contextlib.nullcontext():  # type: ignore[arg-type]
        for _ in range(STEPS + 1):
            positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
            started = time.perf_counter()
            output = model(
                input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True,
                logits_to_keep=1,
            )  # fmt: skip
            seconds.append(time.perf_counter() - started)
            ids = output.logits[:, -1].argmax(-1, keepdim=True)
            mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
    return 1000 * statistics.median(seconds[1:])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="reasoner")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--length", type=int, nargs="+", default=[100, 400])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = fresh(resolve(args.model))
    print(machine())
    print(
        "| rows | length | transformers, ms per step | our attention | and our cache | ratio |\n|---|---|---|---|---|---|"
    )
    ways = ((False, False), (True, False), (True, True))
    for length in args.length:
        times = [
            [step_ms(model, args.rows, length, *way) for way in ways] for _ in range(args.rounds)
        ]
        theirs, attention, both = (statistics.median(column) for column in zip(*times, strict=True))
        print(
            f"| {args.rows} | {length} | {theirs:.0f} | {attention:.0f} | {both:.0f} | {theirs / both:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
