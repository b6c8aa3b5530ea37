"""The schedule of copies alone: rings of the sizes that rac_gpu/source/unstructured_*.cu have, and values in any distribution."""

from __future__ import annotations

import re

import pytest
import torch
from rac_gpu.schedule import BF16, INT4, INT8, Plan, Streams, plan_of
from torch import Tensor

from tests.emulate import SOURCES

# Lines of the ring, steps between a copy and its use, values per line, lines behind the last, steps of a segment.
RINGS = {
    "bf16": (BF16, 96, 3, 1, 0, 512),
    "int8": (INT8, 64, 2, 4, 2, 256),
    "int4": (INT4[64], 32, 2, 8, 2, 256),
}

SOURCE = {"int8": "unstructured_8bit.cu", "int4": "unstructured_int4.cu"}


@pytest.mark.parametrize("name", RINGS)
def test_the_numbers_are_those_of_the_source(name):
    streams, ring, ahead, _, _, most = RINGS[name]
    sources = ["unstructured_bf16.cu"] if name == "bf16" else [SOURCE[name], "windows.h"]
    text = "".join((SOURCES / source).read_text() for source in sources)
    found = {key: int(value) for key, value in re.findall(r"\b([A-Z_]+) = (\d+)[,;]", text)}
    assert (found["RING"], found["AHEAD"], found["COUNTS_BYTES"]) == (ring, ahead, most)
    assert (found["STEP"], found["MASKS"], found["REPEATED"]) == (
        streams.step,
        streams.mask_lines,
        streams.repeated,
    )
    assert (streams.ring, streams.ahead, streams.most_steps) == (ring, ahead, most)


def test_values_and_places():
    assert (BF16.places, BF16.value_bits, BF16.steps(129)) == (16, 16, 8)
    assert (INT8.places, INT8.value_bits, INT8.steps(129)) == (64, 8, 4)
    assert (INT4[128].places, INT4[128].value_bits, INT4[64].steps(129)) == (64, 4, 4)
    assert [INT4[group].scale_lines(torch.tensor(6)).item() for group in (64, 128)] == [6, 3]
    values = torch.tensor([0, 1, 3, 4, 7, 8])
    assert BF16.lines(values).tolist() == [0, 1, 3, 4, 7, 8]
    assert INT8.lines(values).tolist() == [
        2,
        2,
        2,
        3,
        3,
        4,
    ]  # a window has the word of the next value and one more


def check(plan: Plan, stored: Tensor, name: str) -> None:
    """Goes through each segment as a warp does."""
    _, ring, ahead, per_line, behind, most = RINGS[name]
    for number in range(4 * len(stored)):
        first, steps = int(plan.first[number]), int(plan.steps[number])
        assert steps <= most
        inside = slice(first, first + steps)
        values = (stored + plan.extra)[number // 4, inside].flatten(1)
        read = (
            torch.cat([torch.zeros_like(values[:1]), values.cumsum(0)])
            if steps
            else values.new_zeros(1, values.shape[1])
        )
        assert torch.equal(plan.begins[number // 4, inside].flatten(1), read[:-1].int())
        arrives = (8 * plan.before[number].cumsum(0)).tolist()
        assert len(arrives) == ahead
        for step in range(steps):
            needed = int(read[step + 1].max()) // per_line + behind
            started = arrives[-1] + 8 * int(plan.copied[number, step])
            assert needed <= arrives[step]
            assert started - ring <= int(read[step].min()) // per_line
            arrives.append(started)
        assert arrives[-1] == 8 * int(plan.groups[number])
        assert steps or not arrives[-1]


def patterns(streams: Streams) -> dict[str, Tensor]:
    """Values per stream of 40 or more steps of two tiles."""
    shape, most = (2, 48, 32, streams.count), streams.places
    drifting = torch.zeros(shape, dtype=torch.int32)
    drifting[:, :24, :4], drifting[:, 24:, 4:8] = most, most
    rare = torch.zeros(shape, dtype=torch.int32)
    rare[1, 40, 7] = 1
    return {
        "none": torch.zeros(shape, dtype=torch.int32),
        "all": torch.full(shape, most, dtype=torch.int32),
        "random": torch.randint(0, most + 1, shape).int(),
        "half": torch.randint(most // 2 - 2, most // 2 + 3, shape).int(),
        "drifting": drifting,
        "rare": rare,
        "short": torch.randint(0, most + 1, (2, 128 // streams.step, 32, streams.count)).int(),
        "long": torch.randint(0, most + 1, (1, 4 * streams.most_steps, 32, streams.count)).int(),
    }


@pytest.mark.parametrize("name", RINGS)
@pytest.mark.parametrize("pattern", patterns(BF16))
def test_lines_are_there_in_time_and_none_is_overwritten_early(name, pattern):
    streams = RINGS[name][0]
    stored = patterns(streams)[pattern]
    plan = plan_of(stored, streams)
    check(plan, stored, name)
    assert int(plan.steps.sum()) == stored.shape[0] * stored.shape[1]
    assert bool((stored + plan.extra <= streams.places).all())
    if pattern not in ("random", "short", "long"):
        assert bool(plan.extra.any()) == (pattern == "drifting")
    scales = plan.steps if name == "int4" else 0  # a line per 64 columns
    assert torch.equal(
        plan.units,
        -(-plan.steps // 128) + plan.steps * streams.step // 32 + scales + 8 * plan.groups,
    )
