import torch
from hypothesis import given
from hypothesis import strategies as st
from pruning_reference import best_group

from rac_modifier.pruning.selection import lowest, lowest_along


@given(st.lists(st.integers(0, 4), min_size=1, max_size=40), st.data())
def test_lowest_is_exact_under_ties(values, data):
    count = data.draw(st.integers(0, len(values)))
    scores = torch.tensor(values, dtype=torch.float32)
    mask = lowest(scores, count)
    assert int(mask.sum()) == count
    assert sorted(scores[mask].tolist()) == sorted(values)[:count]


def test_lowest_of_a_strided_matrix():
    scores = torch.arange(12.0).view(3, 4).T
    assert torch.equal(lowest(scores, 5), scores < 5)


@given(st.lists(st.floats(0, 1, width=32), min_size=8, max_size=8, unique=True), st.integers(1, 7))
def test_lowest_along_finds_the_best_group(values, n):
    mask = lowest_along(torch.tensor([values]).T, n, dim=0)
    assert tuple(mask[:, 0].nonzero()[:, 0].tolist()) == best_group(values, n)
