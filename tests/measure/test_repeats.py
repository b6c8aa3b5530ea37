import pytest

from rac_modifier.measure.repeats import repeated_tail

WHOLE = list(range(1000, 1200))


@pytest.mark.parametrize(
    ("ids", "repeated"),
    [
        ([], 0),
        (WHOLE, 0),
        ([7] * 63, 0),  # too short to be called a loop
        ([7] * 64, 63),
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
    assert repeated_tail(ids, "length") == repeated
    assert repeated_tail(ids, "stop") == 0
