"""Where a completion that was cut begins to repeat itself."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rac_modifier.traces.records import Trace
from rac_modifier.traces.repeats import repeated_tokens, without_repeats

WHOLE = list(range(1000, 1200))


@pytest.mark.parametrize(
    ("ids", "repeated"),
    [
        ([], 0),
        ([7], 0),
        (WHOLE, 0),
        ([7] * 63, 0),  # too short to be called a loop
        ([7] * 64, 63),
        (WHOLE + [7] * 64, 63),
        (WHOLE + [1, 2, 3] * 21, 0),  # 63 tokens
        (WHOLE + [1, 2, 3] * 22, 63),
        (WHOLE + [1, 2, 3] * 22 + [1], 64),  # the last copy need not be whole
        (WHOLE + [1, 2, 3] * 22 + [9], 0),  # it left the loop
        (WHOLE + [*range(60)] * 2, 0),  # two copies alone
        (WHOLE + [*range(60)] * 3, 120),
        (WHOLE + [*range(60)] * 2 + [*range(59)], 0),
        ([*range(128)] * 3, 256),
        ([*range(129)] * 4, 0),  # longer than what is looked for
        ([1, 1, 2] * 40, 117),  # the stretch is three tokens, not the one that stands twice
    ],
)
def test_how_many_tokens_repeat(ids, repeated):
    assert repeated_tokens(ids) == repeated


@given(
    st.lists(st.integers(0, 3), max_size=40),
    st.lists(st.integers(0, 3), min_size=1, max_size=12),
    st.integers(0, 20),
)
def test_what_is_left_and_its_stretch_give_the_whole_again(before, stretch, copies):
    ids = before + stretch * copies
    repeated = repeated_tokens(ids)
    if len(stretch) * copies >= 64 and copies >= 3:
        assert (
            repeated >= len(stretch) * (copies - 1) or repeated >= 63
        )  # a shorter stretch may explain the end
    left = ids[: len(ids) - repeated]
    if repeated:
        assert any(
            left + (left[-n:] * repeated)[:repeated] == ids
            for n in range(1, 129)
            if repeated >= 2 * n
        )
        assert repeated_tokens(left) == 0 or len(left) >= 64


def test_only_a_completion_that_was_cut_loses_its_end():
    trace = Trace("a#0", "a", (5, 6), tuple(WHOLE + [1, 2, 3] * 30), "length", 0, "?", None)
    shorter = without_repeats(trace)
    assert shorter == replace(trace, completion_ids=(*WHOLE, 1, 2, 3))
    assert without_repeats(shorter) is shorter
    assert (
        without_repeats(replace(trace, finish_reason="stop")).completion_ids == trace.completion_ids
    )
