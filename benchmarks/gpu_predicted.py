"""Predicted times of the GPU kernels for three models, as the tables of docs/results/gpu.md. Nothing is measured.

    PYTHONPATH=. python benchmarks/gpu_predicted.py

Pure arithmetic, no GPU: the formula of rac_modifier/kernels/cuda/predict.py for the linear layers of a decoder, as vLLM fuses
them. `--measured gpu.json` puts the times that `make gpu-check` measured on a card beside the predicted ones.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from gpu_models import (
    MODELS,
    OF_BATCHES,
    TOKENS,
    batches,
    fp8,
    groups,
    int4,
    int8,
    int8_24,
    models,
    times,
    unstructured,
)

from rac_modifier.errors import RacError
from rac_modifier.kernels.cuda.cards import CARDS, Card, card_of
from rac_modifier.kernels.cuda.layout import (
    ALL,
    BF16,
    INT4,
    UNSTRUCTURED,
    UNSTRUCTURED_INT8,
    Layout,
)
from rac_modifier.kernels.cuda.measured import CONTENDERS, read_measured
from rac_modifier.kernels.cuda.predict import (
    DENSE,
    LAUNCH,
    REACHED,
    Time,
    cusparselt_time,
    dense_time,
    over_dense,
    prompt_times,
    sparse_time,
    time_of,
)
from rac_modifier.kernels.cuda.programs import MOST_TOKENS, decode_program, program, tiles_of

PROMPT = 2048


def cards() -> Iterator[str]:
    """The constants."""
    head = (
        "card | name here | memory, GB/s | multiprocessors | GHz | multiply-adds per cycle | L2, MB"
    )
    yield f"| {head} | bytes per cycle from L2 |"
    yield "|---|---|---|---|---|---|---|---|"
    for c in CARDS:
        rates = f"{c.bandwidth / 1e9:,.0f} | {c.processors} | {c.clock / 1e9:.2f} | {c.products:,}"
        yield f"| {c.title} | `{c.name}` | {rates} | {c.cache >> 20} | {c.cache_port} |"


def ports() -> Iterator[str]:
    """2:4 + int4 over int4 where L2 gives half of what is taken, and twice as much: it decides most with more tokens."""
    yield "| card | bytes per cycle from L2 | 1 token | 8 | 16 | 32 |"
    yield "|---|---|---|---|---|---|"
    for name in ("h100", "4090"):
        own = card_of(name).cache_port
        for port in (own / 2, own, 2 * own):
            card = replace(card_of(name), cache_port=port)
            found = [times(card, "8B", tokens) for tokens in TOKENS]
            gains = " | ".join(f"{t['int4'] / t['2:4 int4']:.2f}x" for t in found)
            yield f"| {name} | {port:g} | {gains} |"


def beside(measured: Path) -> Iterator[str]:
    """Predicted and measured times of the layers that `make gpu-check` timed.

    Raises:
        RacError: what `read_measured` does not read.
    """
    found = read_measured(measured)
    yield f"{found.card.title}, {found.source}"
    yield "| layer | tokens | contender | predicted, us | measured, us | predicted bound |\n|---|---|---|---|---|---|"
    for row in found.times:
        if row.tokens > MOST_TOKENS or row.contender not in CONTENDERS:
            continue  # prompts, and 2:4 by cuSPARSELt, are not predicted
        shape, layout = (row.rows, row.columns), CONTENDERS[row.contender]
        time: Time = (
            dense_time(found.card, *shape, row.tokens, DENSE[layout])
            if isinstance(layout, str)
            else sparse_time(found.card, layout, *shape, row.tokens)
        )
        yield f"| {row.layer} | {row.tokens} | {row.contender} | {time.total:.1f} | {row.us:.1f} | {time.bound} |"


def chosen() -> Iterator[str]:
    """Which layers stay dense with RAC_GPU_KERNELS=on, since they are predicted to be faster so: half stored, 8 tokens."""
    yield "| card | layout | dense, over the kernel |"
    yield "|---|---|---|"
    for card in CARDS:
        for layout in ALL:
            faster = []
            for model, (shapes, _) in MODELS.items():
                for layer, shape in shapes.items():
                    gain = over_dense(card, layout, *shape, 0.5)[0]
                    faster += [f"{model} {layer} {1 / gain:.2f}x"] if gain < 1.0 else []
            if faster:
                group = f", groups of {layout.group}" if layout.group else ""
                yield f"| {card.name} | {layout.title}{group} | {', '.join(faster)} |"


def prompts() -> Iterator[str]:
    """A prompt of 2,048 tokens: the time of all layers, expanded part by part or by cuSPARSELt, over that of dense bfloat16."""
    layouts = {
        "2:4": BF16,
        "2:4 + int4": INT4[128],
        "50 %": UNSTRUCTURED,
        "50 % + int8": UNSTRUCTURED_INT8,
    }
    yield f"| card | model | dense bf16, ms | {' | '.join(layouts)} | 2:4, any values, by cuSPARSELt |"
    yield f"|---|---|---|{'---|' * len(layouts)}---|"
    for card in CARDS:
        for model, (shapes, layers) in MODELS.items():
            each = {
                name: [prompt_times(card, layout, *shape, PROMPT, 0.5) for shape in shapes.values()]
                for name, layout in layouts.items()
            }
            dense = sum(time for _, time in each["2:4"])
            over = " | ".join(
                f"{sum(time for time, _ in found) / dense:.2f}x" for found in each.values()
            )
            sparse = sum(cusparselt_time(card, *shape, PROMPT) for shape in shapes.values())
            yield f"| {card.name} | {model} | {layers * dense / 1000:.1f} | {over} | {sparse / dense:.2f}x |"


def row_tiles() -> Iterator[str]:
    """Row tiles per block of 2:4 + int4, as chosen, and what the best single choice for all layers would take."""
    yield "| card | model | tokens | 16 rows per block, over int4 | 32 rows | 64 rows | 128 rows | chosen |"
    yield "|---|---|---|---|---|---|---|---|"
    for card in CARDS:
        for model, (shapes, _) in MODELS.items():
            for tokens, tiles in ((8, 1), (16, 2), (32, 4), (64, 8)):
                layout, dense = (
                    INT4[128],
                    sum(dense_time(card, *s, tokens, DENSE["int4"]).total for s in shapes.values()),
                )
                gains = []
                for n in (1, 2, 4, 8):
                    own = (
                        (n, tiles) if n == 8 else (n, min(tiles, 4))
                    )  # fewer rows have at most 32 tokens per block
                    if own not in tiles_of(layout):
                        gains.append("")
                        continue
                    each = program(layout, *own)
                    taken = sum(
                        time_of(card, layout, each, *s, tokens, 0.5).total for s in shapes.values()
                    )
                    gains.append(f"{dense / taken:.2f}x")
                chosen = sum(sparse_time(card, layout, *s, tokens).total for s in shapes.values())
                gains.append(f"{dense / chosen:.2f}x")
                yield f"| {card.name} | {model} | {tokens} | {' | '.join(gains)} |"


def split() -> Iterator[str]:
    """1.5B at 8 tokens, if a layer's columns could go over more blocks, whose sums a second kernel adds in a fixed order."""
    tokens, shapes = 8, MODELS["1.5B"][0].values()
    yield f"| card | {' | '.join(OF_BATCHES)} |"
    yield f"|---|{'---|' * len(OF_BATCHES)}"
    for card in CARDS:

        def taken(layout: Layout, rows: int, columns: int, parts: int, card: Card = card) -> float:
            """Of the fastest program; parts of the columns are as more rows of fewer columns."""
            tried = [program(layout, *tiles) for tiles in tiles_of(layout) if tiles[1] == 1]
            shape = rows * parts, columns // parts
            one = min(time_of(card, layout, each, *shape, tokens, 0.5).total for each in tried)
            sums = 1e6 * 4 * tokens * rows * parts / card.bandwidth / REACHED
            return one + (LAUNCH + sums if parts > 1 else 0.0)

        gains = []
        for layout in OF_BATCHES.values():
            now = sum(sparse_time(card, layout, *shape, tokens).total for shape in shapes)
            gains.append(
                now
                / sum(
                    min(taken(layout, *shape, parts) for parts in (1, 2, 4, 8)) for shape in shapes
                )
            )
        yield f"| {card.name} | {' | '.join(f'{gain:.2f}x' for gain in gains)} |"


def expanding() -> Iterator[str]:
    """8B: the time to expand and multiply over the kernels', by tokens."""
    yield f"| card | tokens | {' | '.join(OF_BATCHES)} |"
    yield f"|---|---|{'---|' * len(OF_BATCHES)}"
    for card in CARDS:
        for tokens in (128, 192, 256, 384):
            gains = []
            for layout in OF_BATCHES.values():
                expanded = kernels = 0.0
                for shape in MODELS["8B"][0].values():
                    chosen = decode_program(layout, *shape, tokens, card.processors)
                    kernels += time_of(card, layout, chosen, *shape, tokens, 0.5).total
                    expanded += prompt_times(card, layout, *shape, tokens, 0.5)[0]
                gains.append(f"{expanded / kernels:.2f}x")
            yield f"| {card.name} | {tokens} | {' | '.join(gains)} |"


TABLES = {
    "The cards": cards,
    "Layers that stay dense": chosen,
    "Rows per block": row_tiles,
    "Columns over more blocks": split,
    "Prompts": prompts,
    "From how many tokens on weights are expanded": expanding,
    "Whole models": models,
    "Unstructured bfloat16": unstructured,
    "Other rates of L2": ports,
    "Unstructured int8": int8,
    "2:4 + int8": int8_24,
    "Unstructured int4": int4,
    "Fp8 values": fp8,
    "8-bit values in groups": groups,
    "Batches of 33 to 128 tokens": batches,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--measured",
        type=Path,
        help="JSON that make gpu-check wrote; prints its times beside the predicted",
    )
    arguments = parser.parse_args()
    if arguments.measured is not None:
        print("\n".join(beside(arguments.measured)))
        return
    print("Predicted, nothing was measured on a GPU.")
    for title, table in TABLES.items():
        print(f"\n## {title}\n", *table(), sep="\n")


if __name__ == "__main__":
    try:
        main()
    except RacError as error:
        raise SystemExit(str(error)) from error
