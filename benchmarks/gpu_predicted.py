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

from rac_modifier.errors import RacError
from rac_modifier.files import read_json
from rac_modifier.kernels.cuda.cards import CARDS, Card, card_of
from rac_modifier.kernels.cuda.layout import (
    ALL,
    BF16,
    E4M3,
    INT4,
    INT8,
    UNSTRUCTURED,
    UNSTRUCTURED_E4M3,
    UNSTRUCTURED_INT4,
    UNSTRUCTURED_INT8,
    Layout,
)
from rac_modifier.kernels.cuda.predict import DENSE, Time, dense_time, over_dense, prompt_times, sparse_time, time_of
from rac_modifier.kernels.cuda.programs import program

TOKENS = (1, 8, 16, 32)
PROMPT = 2048
# Rows and columns of qkv, o, gate_up, down; number of layers. From the models' config.json.
MODELS = {
    "1.5B": ({"qkv": (2048, 1536), "o": (1536, 1536), "gate_up": (17920, 1536), "down": (1536, 8960)}, 28),
    "8B": ({"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}, 32),
    "32B": ({"qkv": (7168, 5120), "o": (5120, 5120), "gate_up": (55296, 5120), "down": (5120, 27648)}, 64),
}
CONTENDERS = {
    "dense bf16": "bf16",
    "dense fp8": "fp8",
    "dense fp8 by CUTLASS": "fp8",
    "dense int4": "int4",
    "dense int4 by Machete": "int4",
    "bf16": BF16,
    "int8": INT8,
    "fp8": E4M3,
    "int4 g128": INT4[128],
    "int4 g64": INT4[64],
    "unstructured": UNSTRUCTURED,
    "unstructured int8": UNSTRUCTURED_INT8,
    "unstructured fp8": UNSTRUCTURED_E4M3,
    "unstructured int4 g128": UNSTRUCTURED_INT4[128],
    "unstructured int4 g64": UNSTRUCTURED_INT4[64],
}  # as make gpu-check names them


def times(card: Card, model: str, tokens: int) -> dict[str, float]:
    """Milliseconds of all layers of a model, by format."""
    shapes, layers = MODELS[model]
    found = {
        name: sum(dense_time(card, *s, tokens, size).total for s in shapes.values()) for name, size in DENSE.items()
    }
    for name, layout in (("2:4", BF16), ("2:4 int4", INT4[128])):
        found[name] = sum(sparse_time(card, layout, *s, tokens).total for s in shapes.values())
    return {name: layers * time / 1000 for name, time in found.items()}


def unstructured_time(card: Card, model: str, tokens: int, sparsity: float, layout: Layout = UNSTRUCTURED) -> float:
    """Milliseconds of all layers of a model with this share of zeros anywhere."""
    shapes, layers = MODELS[model]
    each = [sparse_time(card, layout, *s, tokens, 1 - sparsity).total for s in shapes.values()]
    return layers * sum(each) / 1000


def two_of_four_time(card: Card, model: str, tokens: int, layout: Layout) -> float:
    """Milliseconds of all layers of a model, 2:4."""
    shapes, layers = MODELS[model]
    return layers * sum(sparse_time(card, layout, *s, tokens).total for s in shapes.values()) / 1000


def bound(card: Card, model: str, tokens: int, layout: Layout = INT4[128]) -> str:
    """What most of the time of a layout is bound by."""
    each = [sparse_time(card, layout, *shape, tokens) for shape in MODELS[model][0].values()]
    sums: dict[str, float] = {}
    for time in each:
        sums[time.bound] = sums.get(time.bound, 0.0) + time.total
    return max(sums, key=sums.__getitem__)


def cards() -> Iterator[str]:
    """The constants."""
    head = "card | name here | memory, GB/s | multiprocessors | GHz | multiply-adds per cycle | L2, MB"
    yield f"| {head} | bytes per cycle from L2 |"
    yield "|---|---|---|---|---|---|---|---|"
    for c in CARDS:
        rates = f"{c.bandwidth / 1e9:,.0f} | {c.processors} | {c.clock / 1e9:.2f} | {c.products:,}"
        yield f"| {c.title} | `{c.name}` | {rates} | {c.cache >> 20} | {c.cache_port} |"


def models() -> Iterator[str]:
    """Every card, model and number of tokens."""
    absolute = "dense bf16, ms | fp8, ms | int4, ms | 2:4, ms | 2:4 + int4, ms"
    relative = "2:4 over bf16 | 2:4 + int4 over bf16 | over fp8 | over int4"
    yield f"| card | model | tokens | {absolute} | {relative} | bound by |"
    yield "|---|---|---|---|---|---|---|---|---|---|---|---|---|"
    for card in CARDS:
        for model in MODELS:
            for tokens in TOKENS:
                t = times(card, model, tokens)
                sparse = t["2:4 int4"]
                gains = (t["bf16"] / t["2:4"], t["bf16"] / sparse, t["fp8"] / sparse, t["int4"] / sparse)
                numbers = [f"{t[name]:.2f}" for name in (*DENSE, "2:4", "2:4 int4")] + [
                    f"{gain:.2f}x" for gain in gains
                ]
                yield f"| {card.name} | {model} | {tokens} | {' | '.join(numbers)} | {bound(card, model, tokens)} |"


def unstructured() -> Iterator[str]:
    """Bfloat16 of any pattern: every card, model and number of tokens, over dense bfloat16, and at 70 % over FP8."""
    absolute = "dense bf16, ms | 50 %, ms"
    yield f"| card | model | tokens | {absolute} | 50 % over bf16 | 60 % | 70 % | 80 % | 70 % over fp8 | 50 % bound by |"
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    for card in CARDS:
        for model in MODELS:
            for tokens in TOKENS:
                t = times(card, model, tokens)
                found = [unstructured_time(card, model, tokens, sparsity) for sparsity in (0.5, 0.6, 0.7, 0.8)]
                gains = " | ".join(f"{t['bf16'] / each:.2f}x" for each in found)
                numbers = f"{t['bf16']:.2f} | {found[0]:.2f} | {gains} | {t['fp8'] / found[2]:.2f}x"
                bound_by = bound(card, model, tokens, UNSTRUCTURED)
                yield f"| {card.name} | {model} | {tokens} | {numbers} | {bound_by} |"


def int8_24() -> Iterator[str]:
    """2:4 + int8: every card, model and number of tokens."""
    yield "| card | model | tokens | fp8, ms | 2:4 + int8, ms | over fp8 | over bf16 | over int4 | bound by |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for card in CARDS:
        for model in MODELS:
            for tokens in TOKENS:
                t, taken = times(card, model, tokens), two_of_four_time(card, model, tokens, INT8)
                gains = " | ".join(f"{t[name] / taken:.2f}x" for name in ("fp8", "bf16", "int4"))
                numbers = f"{t['fp8']:.2f} | {taken:.2f} | {gains} | {bound(card, model, tokens, INT8)}"
                yield f"| {card.name} | {model} | {tokens} | {numbers} |"


def fp8() -> Iterator[str]:
    """Fp8, 2:4 and of any pattern: every card, model and number of tokens, over dense FP8 and over int4."""
    head = "fp8, ms | 2:4 + fp8, ms | over fp8 | over int4 | bound by"
    yield f"| card | model | tokens | {head} | 50 % + fp8, ms | over fp8 | 60 % | 70 % | 50 % over int4 | 50 % bound by |"
    yield "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|"
    for card in CARDS:
        for model in MODELS:
            for tokens in TOKENS:
                t, even = times(card, model, tokens), two_of_four_time(card, model, tokens, E4M3)
                each = [unstructured_time(card, model, tokens, share, UNSTRUCTURED_E4M3) for share in (0.5, 0.6, 0.7)]
                gains = [t["fp8"] / time for time in each] + [t["int4"] / each[0]]
                cells = [
                    f"{t['fp8']:.2f} | {even:.2f} | {t['fp8'] / even:.2f}x | {t['int4'] / even:.2f}x",
                    bound(card, model, tokens, E4M3),
                    f"{each[0]:.2f}",
                    *(f"{gain:.2f}x" for gain in gains),
                    bound(card, model, tokens, UNSTRUCTURED_E4M3),
                ]
                yield f"| {card.name} | {model} | {tokens} | {' | '.join(cells)} |"


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


def int8() -> Iterator[str]:
    """Int8 of any pattern: every card, model and number of tokens, over dense FP8, and at 50 % over the others."""
    gains_of = "50 % over fp8 | 60 % | 70 % | 50 % over bf16 | over int4"
    yield f"| card | model | tokens | fp8, ms | 50 %, ms | {gains_of} | 50 % bound by |"
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    for card in CARDS:
        for model in MODELS:
            for tokens in TOKENS:
                t = times(card, model, tokens)
                each = [unstructured_time(card, model, tokens, share, UNSTRUCTURED_INT8) for share in (0.5, 0.6, 0.7)]
                half = each[0]
                gains = [t["fp8"] / time for time in each] + [t["bf16"] / half, t["int4"] / half]
                numbers = " | ".join([f"{t['fp8']:.2f}", f"{half:.2f}", *(f"{gain:.2f}x" for gain in gains)])
                yield f"| {card.name} | {model} | {tokens} | {numbers} | {bound(card, model, tokens, UNSTRUCTURED_INT8)} |"


def int4() -> Iterator[str]:
    """Int4 of any pattern in groups of 128: every card, model and number of tokens, over dense int4."""
    yield "| card | model | tokens | int4, ms | 50 %, ms | 50 % over int4 | 60 % | 70 % | 50 % over fp8 | 50 % bound by |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for card in CARDS:
        for model in MODELS:
            for tokens in TOKENS:
                t, layout = times(card, model, tokens), UNSTRUCTURED_INT4[128]
                each = [unstructured_time(card, model, tokens, share, layout) for share in (0.5, 0.6, 0.7)]
                gains = [t["int4"] / time for time in each] + [t["fp8"] / each[0]]
                numbers = " | ".join([f"{t['int4']:.2f}", f"{each[0]:.2f}", *(f"{gain:.2f}x" for gain in gains)])
                yield f"| {card.name} | {model} | {tokens} | {numbers} | {bound(card, model, tokens, layout)} |"


def beside(measured: Path) -> Iterator[str]:
    """Predicted and measured times of the layers that `make gpu-check` timed.

    Raises:
        RacError: a card that is not in the table.
    """
    record = read_json(measured)
    card = next((card for card in CARDS if card.reported == record.get("device")), None)
    if card is None:
        known = ", ".join(card.reported for card in CARDS)
        raise RacError(f'{measured}: device "{record.get("device")}" is not in the table of cards, which has {known}')
    yield f"{card.title}, {measured.name}"
    yield "| layer | tokens | contender | predicted, us | measured, us | predicted bound |\n|---|---|---|---|---|---|"
    for row in record["times"]:
        if row["tokens"] > TOKENS[-1] or row["contender"] not in CONTENDERS:
            continue  # prompts, and 2:4 by cuSPARSELt, are not predicted
        shape, layout = MODELS["8B"][0][row["layer"]], CONTENDERS[row["contender"]]
        dense = isinstance(layout, str)
        time: Time = (
            dense_time(card, *shape, row["tokens"], DENSE[layout])
            if dense
            else sparse_time(card, layout, *shape, row["tokens"])
        )
        yield f"| {row['layer']} | {row['tokens']} | {row['contender']} | {time.total:.1f} | {row['us']:.1f} | {time.bound} |"


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
    """A prompt of 2,048 tokens: the time of all layers, expanded part by part, over that of dense bfloat16."""
    layouts = {"2:4": BF16, "2:4 + int4": INT4[128], "50 %": UNSTRUCTURED, "50 % + int8": UNSTRUCTURED_INT8}
    yield f"| card | model | dense bf16, ms | {' | '.join(layouts)} |"
    yield f"|---|---|---|{'---|' * len(layouts)}"
    for card in CARDS:
        for model, (shapes, layers) in MODELS.items():
            each = {
                name: [prompt_times(card, layout, *shape, PROMPT, 0.5) for shape in shapes.values()]
                for name, layout in layouts.items()
            }
            dense = sum(time for _, time in each["2:4"])
            over = " | ".join(f"{sum(time for time, _ in found) / dense:.2f}x" for found in each.values())
            yield f"| {card.name} | {model} | {layers * dense / 1000:.1f} | {over} |"


def row_tiles() -> Iterator[str]:
    """Row tiles per block of 2:4 + int4, as chosen, and what the best single choice for all layers would take."""
    yield "| card | model | tokens | 16 rows per block, over int4 | 32 rows | 64 rows | chosen |"
    yield "|---|---|---|---|---|---|---|"
    for card in CARDS:
        for model, (shapes, _) in MODELS.items():
            for tokens, tiles in ((8, 1), (16, 2), (32, 4)):
                layout, dense = (
                    INT4[128],
                    sum(dense_time(card, *s, tokens, DENSE["int4"]).total for s in shapes.values()),
                )
                fixed = [
                    sum(
                        time_of(card, layout, program(layout, n, tiles), *s, tokens, 0.5).total for s in shapes.values()
                    )
                    for n in (1, 2, 4)
                ]
                own = sum(sparse_time(card, layout, *s, tokens).total for s in shapes.values())
                gains = " | ".join(f"{dense / each:.2f}x" for each in (*fixed, own))
                yield f"| {card.name} | {model} | {tokens} | {gains} |"


TABLES = {
    "The cards": cards,
    "Layers that stay dense": chosen,
    "Rows per block": row_tiles,
    "Prompts": prompts,
    "Whole models": models,
    "Unstructured bfloat16": unstructured,
    "Other rates of L2": ports,
    "Unstructured int8": int8,
    "2:4 + int8": int8_24,
    "Unstructured int4": int4,
    "Fp8 values": fp8,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--measured", type=Path, help="JSON that make gpu-check wrote; prints its times beside the predicted"
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
