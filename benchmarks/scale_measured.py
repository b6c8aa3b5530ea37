"""The table of processes from times that were measured on this CPU, of the 0.5B shape: `scale_estimate.py --measured`.

One row is of the products of a layer, its statistics and its solver; the other one of a whole run: with attention in the forward
passes, and with what the first process does alone (scale_parts.py).
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch
from scale_estimate import RANKS, TOKENS, GroupTimes, layer_seconds, moved_between, ranks_table
from scale_models import Model
from scale_parts import Parts, parts

from rac_modifier.frontier.compressing import PASSES, solving
from rac_modifier.pruning.hessian import Statistics
from rac_modifier.pruning.solve import solve
from rac_modifier.settings.pattern import Pattern

SHAPE = Model("0.5B", 24, 896, 4864, 896, 128, 151_936)


def measured(shape: Model, tokens: int) -> list[GroupTimes]:
    """Of the groups of a layer on this CPU in one thread: products of forward passes, statistics, solver.

    Prints a row per group. Times are of the processor, those of tokens taken to be in proportion to their number.
    """
    torch.manual_seed(0)
    found = []
    for group in shape.layer():
        rows = sum(group.rows)
        weights = [torch.randn(each, group.columns) for each in group.rows]
        x = torch.randn(tokens, group.columns)
        both = list(zip(x.split(1024), (x + 0.1 * torch.randn_like(x)).split(1024), strict=True))
        statistics = Statistics(group.columns, "cpu", weights)
        times = [time.process_time()]
        for part, _ in both * PASSES:
            for weight in weights:
                part @ weight.T
        times.append(time.process_time())
        for part, dense in both:
            statistics.add(part, torch.ones(len(part)), dense)
        times.append(time.process_time())
        hessian, cross = statistics.hessian.matrix(), statistics.cross_moment()
        solve("alps", weights, hessian, Pattern.n_of_m(2, 4), cross_moment=cross)
        times.append(time.process_time())
        passes, added, solved = (after - before for before, after in pairwise(times))
        work = solving(
            group.columns, rows
        )  # the factors' share of the time is taken to be that of the operations
        factors = solved * work.float32 / (work.float32 + work.products)
        summed, sent = moved_between(group)
        per_row, scale = (solved - factors) / rows, TOKENS / tokens
        seconds = (passes + added) * scale
        found.append(GroupTimes(group, seconds, summed, sent, factors, per_row, passes * scale))
        print(
            f"| {group.columns} -> {rows} | {passes:.1f} s | {added:.1f} s | {solved:.1f} s |",
            flush=True,
        )
    return found


def with_attention(times: list[GroupTimes], whole: Parts) -> list[GroupTimes]:
    """The times of a layer, with whole forward passes in place of their products."""
    first, *rest = [
        replace(each, tokens=each.tokens - each.products, products=0.0) for each in times
    ]
    passes = PASSES * TOKENS * whole.forward
    return [replace(first, tokens=first.tokens + passes, products=passes), *rest]


def parts_table(shape: Model, times: list[GroupTimes], whole: Parts) -> Iterator[str]:
    """Seconds of the parts of a whole run in one process; `times` are those `with_attention`."""
    yield "| part of a whole run of 0.5B | one process | of several |"
    yield "|---|---|---|"
    passes = sum(each.products for each in times)
    divided = {
        "forward passes, with attention": (passes, "each its batches"),
        "statistics": (sum(each.tokens for each in times) - passes, "each its batches"),
        "solving": (sum(each.solving(sum(each.group.rows)) for each in times), "one per group"),
    }
    rows = {name: (shape.layers * seconds, who) for name, (seconds, who) in divided.items()}
    rows |= {name: (seconds, "the first") for name, seconds in whole.alone.items()}
    rows["loading"] = (whole.alone["loading"], "each the whole")
    for name, (seconds, who) in rows.items():
        yield f"| {name} | {seconds:,.1f} s | {who} |"


def whole_seconds(shape: Model, times: list[GroupTimes], whole: Parts, ranks: int) -> float:
    """Of a whole run without sampling in so many processes; `times` are those `with_attention`."""
    return shape.layers * layer_seconds(times, ranks) + sum(whole.alone.values())


def show(tokens: int) -> None:
    """Measure on so many tokens, and print the tables."""
    torch.set_num_threads(1)
    print("| group | forward passes | statistics | solving |", "|---|---|---|---|", sep="\n")
    times = measured(SHAPE, tokens)
    with tempfile.TemporaryDirectory() as folder:
        whole = parts(SHAPE, Path(folder) / "model")
    attending = with_attention(times, whole)
    print("", *parts_table(SHAPE, attending, whole), "", sep="\n")
    rows = {
        "a layer of 0.5B, measured": [layer_seconds(times, ranks) for ranks in RANKS],
        "a whole run of 0.5B, measured": [
            whole_seconds(SHAPE, attending, whole, ranks) for ranks in RANKS
        ],
    }
    print(*ranks_table(rows), sep="\n")
