"""What pruning 7B to 235B parameters would take, estimated from counted operations and bytes.

    PYTHONPATH=. python benchmarks/scale_estimate.py
    PYTHONPATH=. python benchmarks/scale_estimate.py --measured

Nothing here was measured on a GPU. Operations are those of rac_modifier/frontier/compressing.py, sampling and rates those of
rac_modifier/frontier/estimate.py, memory that of rac_modifier/llmcompressor/memory.py, and who solves which group is decided by
rac_modifier/llmcompressor/solving.py itself. `--measured` times the parts of a run of the 0.5B shape on this CPU instead, for the
table of processes (scale_measured.py; three minutes of a core). docs/results/scale.md has the tables.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from unittest import mock

from scale_models import MODELS, Model

from rac_modifier.calibration.loader import LANES
from rac_modifier.frontier.compressing import PASSES, Group, Operations, moments, solving
from rac_modifier.frontier.estimate import MEAN_SHARE, REACHED, Asked, Plan, Speed, estimate
from rac_modifier.llmcompressor.group_shape import GroupShape, in_order
from rac_modifier.llmcompressor.memory import MemoryNeed
from rac_modifier.llmcompressor.solving import owners
from rac_modifier.llmcompressor.step_memory import Attention, SolverMemory
from rac_modifier.pruning import linalg

# Of the makers' data sheets (H100 SXM); of the first three, REACHED of it is assumed.
H100 = Speed(copied=3.35e12, computed=989e12, computed32=67e12)
LINK = 300e9  # bytes per second between GPUs, reached
HOST = 25e9  # bytes per second between a GPU and the memory of the host, reached
DISK = 1e9  # bytes per second, reached
PACKING = 20e-9  # seconds per weight on one core of a CPU, assumed
HELD_OUT = 2 * 2048  # tokens of the divergence: held out, and calibrated on
BATCH = 4096  # calibration.batch_tokens, so that 64 processes get about the same number of batches
TOKENS = 1_000_000
CAP, AT_ONCE = 8192, 256
RANKS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class GroupTimes:
    """Seconds of one group of a layer in one process: what is shared by tokens, moved bytes included, and what per module.

    `summed` are the bytes of its statistics and `sent` those of its results, between processes. `products` is the part of
    `tokens` that forward passes take, where that is measured.
    """

    group: Group
    tokens: float
    summed: int
    sent: int
    factors: float
    per_row: float
    products: float = 0.0

    def solving(self, rows: int) -> float:
        """Of so many rows in one process."""
        return (self.factors + self.per_row * rows) if rows else 0.0


def counted(group: Group, hidden: int, tokens: int) -> GroupTimes:
    """Of a group on an H100, from operations and bytes."""
    rates = REACHED * H100.computed, REACHED * H100.computed32
    passes = PASSES * 2 * group.weights * tokens * group.share / rates[0]
    # per stream and stage: read for the statistics, read to run it, written
    moved = 2 * 2 * tokens * group.share * (2 * group.columns + hidden) / HOST
    statistics = moments(group, tokens).seconds(*rates)
    rows = sum(group.rows)
    work = solving(group.columns, rows)
    factors, products = (
        Operations(0.0, work.float32).seconds(*rates),
        Operations(work.products, 0.0).seconds(*rates),
    )
    return GroupTimes(
        group, passes + moved + statistics, *moved_between(group), factors, products / rows
    )


def moved_between(group: Group) -> tuple[int, int]:
    """Bytes of the statistics, which are summed over the processes, and of the results, which are sent to all."""
    rows = sum(group.rows)
    cross = group.columns * (group.columns if rows >= group.columns / 2 else rows)
    return 4 * (group.columns**2 + cross), 2 * group.weights


def layer_seconds(times: list[GroupTimes], ranks: int, together: bool = False) -> float:
    """Of one layer in so many processes. `together`: its groups are solved at once (layer by layer), else one after the other."""
    batches = -(-TOKENS // BATCH)
    lanes = max(LANES, ranks)  # today at most LANES processes share a run
    rounds = [
        -(-(batches - first) // lanes) for first in range(0, lanes, ranks)
    ]  # batches of the largest lane in each
    seconds = sum(each.tokens for each in times) * sum(rounds) / batches
    if ranks > 1:  # the lanes of each round are exchanged, and the sum is sent to all
        moved = (len(rounds) + 1) * (ranks - 1) / ranks
        seconds += sum(moved * each.summed + each.sent for each in times) / LINK
    stages = [times] if together else [[each] for each in times]
    for stage in stages:
        busy = [0.0] * ranks
        for each, rank in zip(
            stage, owners([each.group.weights for each in stage], ranks), strict=True
        ):
            busy[rank] += each.solving(sum(each.group.rows))
        seconds += max(busy)
    return seconds


def sampling_seconds(model: Model, gpus: int) -> float:
    """Of the traces, as if so many GPUs sampled side by side without loss; vLLM's own estimate is not asked."""
    asked = Asked("traces", round(TOKENS / (MEAN_SHARE * CAP)), CAP, AT_ONCE, served=True)
    (step, *_) = estimate(Plan(model.shape, 0, TOKENS, asked, (), 0), H100)
    return step.seconds / gpus


def first_only(model: Model) -> dict[str, float]:
    """What the first process does alone."""
    shape = model.shape
    weights = sum(group.weights for group in shape.groups)
    divergence = PASSES * 2 * shape.computing * HELD_OUT / (REACHED * H100.computed)
    # through the memory of the host, layer by layer, in each pass
    divergence += PASSES * 2 * shape.nbytes / HOST
    written = shape.nbytes * (1 + 1 + 0.57) / DISK  # written dense, read, written packed
    return {
        "divergence": divergence,
        "loading and saving": shape.nbytes / DISK + written + PACKING * weights,
    }


def pruning_times(model: Model) -> tuple[list[GroupTimes], bool]:
    """The groups of a layer, and whether they are solved at once."""
    return [counted(group, model.hidden, TOKENS) for group in model.layer()], bool(model.experts)


def total_seconds(model: Model, ranks: int) -> float:
    """Of a whole run without sampling."""
    times, together = pruning_times(model)
    return model.layers * layer_seconds(times, ranks, together) + sum(first_only(model).values())


def count_table() -> Iterator[str]:
    """Operations by part."""
    yield "| model | parameters | forward passes | second and cross moments | factors | products of ALPS and refit | all, 1e15 |"
    yield "|---|---|---|---|---|---|---|"
    for model in MODELS:
        shape = model.shape
        passes = sum(PASSES * 2 * group.weights * TOKENS * group.share for group in shape.groups)
        statistics = sum(sum(vars(moments(group, TOKENS)).values()) for group in shape.groups)
        solved = [solving(group.columns, sum(group.rows)) for group in shape.groups]
        parts = (
            passes,
            statistics,
            sum(each.float32 for each in solved),
            sum(each.products for each in solved),
        )
        cells = [f"{part / sum(parts):.0%}" for part in parts]
        yield f"| {model.name} | {shape.parameters / 1e9:.1f}e9 | {' | '.join(cells)} | {sum(parts) / 1e15:,.0f} |"


def readable(seconds: float) -> str:
    """In minutes, or hours where that suits it."""
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def hours_table() -> Iterator[str]:
    """Hours by part."""
    yield "| model | GPUs | sampling | calibration | solving | divergence | loading and saving | all but sampling |"
    yield "|---|---|---|---|---|---|---|---|"
    for model in MODELS:
        times, together = pruning_times(model)
        nothing = [GroupTimes(each.group, 0.0, 0, 0, each.factors, each.per_row) for each in times]
        for ranks in (1, 2, 8):
            solved = model.layers * layer_seconds(nothing, ranks, together)
            alone = first_only(model)
            whole = total_seconds(model, ranks)
            parts = (whole - sum(alone.values()) - solved, solved, *alone.values(), whole)
            cells = " | ".join(readable(seconds) for seconds in parts)
            fits = model.shape.nbytes < 70e9 * ranks
            sampled = readable(sampling_seconds(model, ranks)) if fits else "does not fit"
            yield f"| {model.name} | {ranks} | {sampled} | {cells} |"


def memory_table() -> Iterator[str]:
    """Bytes of the device, of the host and of the disk."""
    host = "host: weights | host: activations | computed twice"
    yield f"| model | on the GPU: the largest group | layer of weights | {host} | disk |"
    yield "|---|---|---|---|---|---|---|"
    for model in (each for each in MODELS if not each.everywhere):
        shape = model.shape
        steps = SolverMemory("alps", dense_target=True, refits=True, float32=False)
        attention = Attention.of(
            model, [(1, BATCH)] * (-(-TOKENS // BATCH)), 2
        )  # a trace per batch
        need = MemoryNeed(
            TOKENS, BATCH, model.hidden, 2, by_layer=False, solver=steps, attention=attention
        )
        groups = list(model.layer())
        names = [
            "layer.attn.q",
            "layer.attn.o",
            *["layer.mlp.each"] * (len(groups) - 2),
            "layer.attn.q",
        ]
        shapes = in_order(
            [
                GroupShape(name, group.columns, sum(group.rows), routed=group.share < 1)
                for name, group in zip(
                    names, groups + groups[:1], strict=True
                )  # and the next layer's first
            ]
        )
        with mock.patch.object(linalg, "bf16_is_fast", return_value=True):  # as on the GPU
            work = max(map(need.work, shapes))
        # of a mixture, as if the statistics of all experts of a layer were there at once, and the inputs of all
        work += sum(moved_between(group)[0] for group in groups[2:]) if model.experts else 0
        widest = max(group.columns for group in groups[:3])
        inputs = model.inner * max(model.chosen, 1)
        kept = (
            need.kept(GroupShape("", max(widest, inputs), 0))
            if model.experts
            else max(map(need.kept, shapes))
        )
        twice = replace(
            need, twice_before=max(group.columns for group in shapes if not group.routed)
        )
        less = kept if model.experts else max(map(twice.kept, shapes))
        layer = 2 * sum(group.weights for group in model.layer())
        disk = shape.nbytes * (1 + 0.57) + shape.nbytes + 4 * TOKENS
        cells = " | ".join(
            f"{count / 1e9:,.1f} GB" for count in (work, layer, shape.nbytes, kept, less, disk)
        )
        yield f"| {model.name} | {cells} |"


def ranks_table(rows: dict[str, list[float]]) -> Iterator[str]:
    """Speed-up by number of processes, and the share of the time of one that is not divided."""
    yield "| what | " + " | ".join(str(ranks) for ranks in RANKS) + " | part that stays at 64 |"
    yield "|---" * (len(RANKS) + 2) + "|"
    for name, seconds in rows.items():
        cells = " | ".join(f"{seconds[0] / each:.1f}" for each in seconds)
        stays = (seconds[-1] / seconds[0] - 1 / RANKS[-1]) / (1 - 1 / RANKS[-1])
        yield f"| {name} | {cells} | {stays:.1%} |"


def simulated() -> dict[str, list[float]]:
    """Seconds of whole runs without sampling, by number of processes, from the counts."""
    return {model.name: [total_seconds(model, ranks) for ranks in RANKS] for model in MODELS}


TABLES = {
    "Operations": count_table,
    "Hours": hours_table,
    "Memory and disk": memory_table,
    "Processes": lambda: ranks_table(simulated()),
}


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--measured", action="store_true", help="time the parts of a layer on this CPU"
    )
    parser.add_argument(
        "--tokens", type=int, default=8192, help="with --measured; seconds are for a million"
    )
    asked = parser.parse_args()
    if asked.measured:
        import scale_measured

        scale_measured.show(asked.tokens)
        return
    for title, table in TABLES.items():
        print(f"## {title}\n")
        print(*table(), sep="\n")
        print()


if __name__ == "__main__":
    main()
