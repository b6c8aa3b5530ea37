"""Predicted times of the linear layers of three models: the tables of `gpu_predicted.py` by format. Nothing is measured."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from rac_modifier.kernels.cuda.cards import CARDS, Card
from rac_modifier.kernels.cuda.layout import (
    BF16,
    E4M3,
    E4M3_GROUPS,
    INT4,
    INT8,
    INT8_GROUPS,
    UNSTRUCTURED,
    UNSTRUCTURED_E4M3,
    UNSTRUCTURED_E4M3_GROUPS,
    UNSTRUCTURED_INT4,
    UNSTRUCTURED_INT8,
    UNSTRUCTURED_INT8_GROUPS,
    Layout,
)
from rac_modifier.kernels.cuda.predict import DENSE, dense_time, sparse_time

TOKENS = (1, 8, 16, 32)
# Rows and columns of qkv, o, gate_up, down; number of layers. From the models' config.json.
MODELS = {
    "1.5B": (
        {"qkv": (2048, 1536), "o": (1536, 1536), "gate_up": (17920, 1536), "down": (1536, 8960)},
        28,
    ),
    "8B": (
        {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)},
        32,
    ),
    "32B": (
        {"qkv": (7168, 5120), "o": (5120, 5120), "gate_up": (55296, 5120), "down": (5120, 27648)},
        64,
    ),
}
EVERY = [*itertools.product(CARDS, MODELS, TOKENS)]
# The formats that batches are predicted for.
OF_BATCHES = {
    "2:4": BF16,
    "2:4 + int8": INT8,
    "2:4 + int4": INT4[128],
    "50 %": UNSTRUCTURED,
    "50 % + int8": UNSTRUCTURED_INT8,
}


def times(card: Card, model: str, tokens: int) -> dict[str, float]:
    """Milliseconds of all layers of a model, by format."""
    shapes, layers = MODELS[model]
    found = {
        name: sum(dense_time(card, *s, tokens, size).total for s in shapes.values())
        for name, size in DENSE.items()
    }
    for name, layout in (("2:4", BF16), ("2:4 int4", INT4[128])):
        found[name] = sum(sparse_time(card, layout, *s, tokens).total for s in shapes.values())
    return {name: layers * time / 1000 for name, time in found.items()}


def unstructured_time(
    card: Card, model: str, tokens: int, sparsity: float, layout: Layout = UNSTRUCTURED
) -> float:
    """Milliseconds of all layers of a model with this share of zeros anywhere."""
    shapes, layers = MODELS[model]
    each = [sparse_time(card, layout, *s, tokens, 1 - sparsity).total for s in shapes.values()]
    return layers * sum(each) / 1000


def layout_time(card: Card, model: str, tokens: int, layout: Layout) -> float:
    """Milliseconds of all layers of a model; half stored, where a layout has any pattern."""
    shapes, layers = MODELS[model]
    return layers * sum(sparse_time(card, layout, *s, tokens).total for s in shapes.values()) / 1000


def bound(card: Card, model: str, tokens: int, layout: Layout = INT4[128]) -> str:
    """What most of the time of a layout is bound by."""
    each = [sparse_time(card, layout, *shape, tokens) for shape in MODELS[model][0].values()]
    sums: dict[str, float] = {}
    for time in each:
        sums[time.bound] = sums.get(time.bound, 0.0) + time.total
    return max(sums, key=sums.__getitem__)


def models() -> Iterator[str]:
    """Every card, model and number of tokens."""
    absolute = "dense bf16, ms | fp8, ms | int4, ms | 2:4, ms | 2:4 + int4, ms"
    relative = "2:4 over bf16 | 2:4 + int4 over bf16 | over fp8 | over int4"
    yield f"| card | model | tokens | {absolute} | {relative} | bound by |"
    yield "|---|---|---|---|---|---|---|---|---|---|---|---|---|"
    for card, model, tokens in EVERY:
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
    for card, model, tokens in EVERY:
        t = times(card, model, tokens)
        found = [
            unstructured_time(card, model, tokens, sparsity) for sparsity in (0.5, 0.6, 0.7, 0.8)
        ]
        gains = " | ".join(f"{t['bf16'] / each:.2f}x" for each in found)
        numbers = f"{t['bf16']:.2f} | {found[0]:.2f} | {gains} | {t['fp8'] / found[2]:.2f}x"
        bound_by = bound(card, model, tokens, UNSTRUCTURED)
        yield f"| {card.name} | {model} | {tokens} | {numbers} | {bound_by} |"


def int8_24() -> Iterator[str]:
    """2:4 + int8: every card, model and number of tokens."""
    yield "| card | model | tokens | fp8, ms | 2:4 + int8, ms | over fp8 | over bf16 | over int4 | bound by |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for card, model, tokens in EVERY:
        t, taken = times(card, model, tokens), layout_time(card, model, tokens, INT8)
        gains = " | ".join(f"{t[name] / taken:.2f}x" for name in ("fp8", "bf16", "int4"))
        numbers = f"{t['fp8']:.2f} | {taken:.2f} | {gains} | {bound(card, model, tokens, INT8)}"
        yield f"| {card.name} | {model} | {tokens} | {numbers} |"


def fp8() -> Iterator[str]:
    """Fp8, 2:4 and of any pattern: every card, model and number of tokens, over dense FP8 and over int4."""
    head = "fp8, ms | 2:4 + fp8, ms | over fp8 | over int4 | bound by"
    yield f"| card | model | tokens | {head} | 50 % + fp8, ms | over fp8 | 60 % | 70 % | 50 % over int4 | 50 % bound by |"
    yield "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|"
    for card, model, tokens in EVERY:
        t, even = times(card, model, tokens), layout_time(card, model, tokens, E4M3)
        each = [
            unstructured_time(card, model, tokens, share, UNSTRUCTURED_E4M3)
            for share in (0.5, 0.6, 0.7)
        ]
        gains = [t["fp8"] / time for time in each] + [t["int4"] / each[0]]
        cells = [
            f"{t['fp8']:.2f} | {even:.2f} | {t['fp8'] / even:.2f}x | {t['int4'] / even:.2f}x",
            bound(card, model, tokens, E4M3),
            f"{each[0]:.2f}",
            *(f"{gain:.2f}x" for gain in gains),
            bound(card, model, tokens, UNSTRUCTURED_E4M3),
        ]
        yield f"| {card.name} | {model} | {tokens} | {' | '.join(cells)} |"


def int8() -> Iterator[str]:
    """Int8 of any pattern: every card, model and number of tokens, over dense FP8, and at 50 % over the others."""
    gains_of = "50 % over fp8 | 60 % | 70 % | 50 % over bf16 | over int4"
    yield f"| card | model | tokens | fp8, ms | 50 %, ms | {gains_of} | 50 % bound by |"
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    for card, model, tokens in EVERY:
        t = times(card, model, tokens)
        each = [
            unstructured_time(card, model, tokens, share, UNSTRUCTURED_INT8)
            for share in (0.5, 0.6, 0.7)
        ]
        half = each[0]
        gains = [t["fp8"] / time for time in each] + [t["bf16"] / half, t["int4"] / half]
        numbers = " | ".join(
            [f"{t['fp8']:.2f}", f"{half:.2f}", *(f"{gain:.2f}x" for gain in gains)]
        )
        yield f"| {card.name} | {model} | {tokens} | {numbers} | {bound(card, model, tokens, UNSTRUCTURED_INT8)} |"


def int4() -> Iterator[str]:
    """Int4 of any pattern in groups of 128: every card, model and number of tokens, over dense int4."""
    yield "| card | model | tokens | int4, ms | 50 %, ms | 50 % over int4 | 60 % | 70 % | 50 % over fp8 | 50 % bound by |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for card, model, tokens in EVERY:
        t, layout = times(card, model, tokens), UNSTRUCTURED_INT4[128]
        each = [unstructured_time(card, model, tokens, share, layout) for share in (0.5, 0.6, 0.7)]
        gains = [t["int4"] / time for time in each] + [t["fp8"] / each[0]]
        numbers = " | ".join(
            [f"{t['int4']:.2f}", f"{each[0]:.2f}", *(f"{gain:.2f}x" for gain in gains)]
        )
        yield f"| {card.name} | {model} | {tokens} | {numbers} | {bound(card, model, tokens, layout)} |"


def groups() -> Iterator[str]:
    """Int8 and fp8 with a scale per row and 128 or 64 columns: 8B, over dense FP8, and beside one scale per row."""
    kinds = {
        "2:4 + int8": (INT8, INT8_GROUPS),
        "2:4 + fp8": (E4M3, E4M3_GROUPS),
        "50 % + int8": (UNSTRUCTURED_INT8, UNSTRUCTURED_INT8_GROUPS),
        "50 % + fp8": (UNSTRUCTURED_E4M3, UNSTRUCTURED_E4M3_GROUPS),
    }
    yield f"| card | tokens | {' | '.join(f'{kind}, a scale per row, over fp8 | 128 columns | 64' for kind in kinds)} |"
    yield f"|---|---|{'---|' * (3 * len(kinds))}"
    for card in CARDS:
        for tokens in (1, 8, 16, 32):
            dense = times(card, "8B", tokens)["fp8"]
            layouts = [
                each
                for row, by_group in kinds.values()
                for each in (row, by_group[128], by_group[64])
            ]
            gains = [dense / layout_time(card, "8B", tokens, layout) for layout in layouts]
            yield f"| {card.name} | {tokens} | {' | '.join(f'{gain:.2f}x' for gain in gains)} |"


def batches() -> Iterator[str]:
    """Batches beyond 32 tokens: every card and model, over dense bfloat16, and 2:4 + int4 over int4."""
    yield f"| card | model | tokens | dense bf16, ms | {' | '.join(OF_BATCHES)} | 2:4 + int4 over int4 |"
    yield f"|---|---|---|---|{'---|' * len(OF_BATCHES)}---|"
    for card in CARDS:
        for model in MODELS:
            for tokens in (32, 64, 128):
                t = times(card, model, tokens)
                taken = {
                    name: layout_time(card, model, tokens, layout)
                    for name, layout in OF_BATCHES.items()
                }
                gains = " | ".join(f"{t['bf16'] / each:.2f}x" for each in taken.values())
                int4 = t["int4"] / taken["2:4 + int4"]
                yield f"| {card.name} | {model} | {tokens} | {t['bf16']:.2f} | {gains} | {int4:.2f}x |"
