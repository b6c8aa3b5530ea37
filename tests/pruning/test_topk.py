import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rac_modifier.pruning.topk import (
    lowest,
    lowest_along,
    ranks_in_groups,
    sampled_places,
    sampled_threshold,
)
from tests.pruning.pruning_reference import best_group


@given(st.lists(st.integers(0, 4), min_size=1, max_size=40), st.data())
def test_lowest_is_exact_under_ties(values, data):
    count = data.draw(st.integers(0, len(values)))
    scores = torch.tensor(values, dtype=torch.float32)
    mask = lowest(scores, count)
    assert int(mask.sum()) == count
    assert sorted(scores[mask].tolist()) == sorted(values)[:count]


@pytest.mark.parametrize("kind", ["even", "ties", "what a sample misses"])
def test_lowest_of_many_is_exact(kind):
    """Those near the threshold are found from a sample; where that misleads, all are gone through."""
    size = 400_000
    scores = torch.rand(size, generator=torch.Generator().manual_seed(0))
    if kind == "ties":
        scores = (scores * 5).floor()
    if kind == "what a sample misses":
        scores[:: size // 32_768 | 1] += 1.0
    for count in (1, 3, 1000, 160_000, 399_990, size):
        mask = lowest(scores, count)
        assert int(mask.sum()) == count
        assert scores[mask].max() == scores.sort().values[count - 1]
        assert count == size or scores[~mask].min() >= scores[mask].max()


def test_lowest_of_a_strided_matrix():
    scores = torch.arange(12.0).view(3, 4).T
    assert torch.equal(lowest(scores, 5), scores < 5)


@given(st.lists(st.floats(0, 1, width=32), min_size=8, max_size=8, unique=True), st.integers(1, 7))
def test_lowest_along_finds_the_best_group(values, n):
    mask = lowest_along(torch.tensor([values]).T, n, dim=0)
    assert tuple(mask[:, 0].nonzero()[:, 0].tolist()) == best_group(values, n)


@given(st.integers(1, 12), st.integers(1, 5), st.integers(1, 4), st.randoms())
def test_ranks_are_those_of_a_stable_sort(m, groups, columns, random):
    scores = torch.tensor(
        [[float(random.randint(0, 3)) for _ in range(columns)] for _ in range(groups * m)]
    )
    ranks = ranks_in_groups(scores, m)
    for g in range(groups):
        for c in range(columns):
            values = scores[g * m : (g + 1) * m, c].tolist()
            order = sorted(range(m), key=lambda i: values[i])
            assert ranks[g * m : (g + 1) * m, c].tolist() == [order.index(i) for i in range(m)]


def threshold(scores: torch.Tensor, share: float) -> float:
    return sampled_threshold(scores[sampled_places(*scores.shape, scores.device)], share)


@given(st.integers(1, 50), st.integers(1, 50), st.floats(0.0, 1.0), st.integers(0, 99))
def test_the_threshold_of_a_small_matrix_is_exact(rows, columns, share, seed):
    scores = (
        torch.randperm(rows * columns, generator=torch.Generator().manual_seed(seed))
        .view(rows, columns)
        .float()
    )
    count = max(int(scores.numel() * share), 1)
    assert int((scores <= threshold(scores, share)).sum()) == count


@pytest.mark.parametrize(
    "shape", [(256, 1536), (300, 1331), (1, 400_000), (400_000, 1), (512, 4096)]
)
def test_the_threshold_of_a_large_matrix_is_close_whatever_its_order(shape):
    scores = (
        torch.rand(shape, generator=torch.Generator().manual_seed(0)) + torch.arange(shape[1]) % 8
    )  # columns differ by their place
    share = (scores <= threshold(scores, 0.6)).float().mean()
    assert float(share) == pytest.approx(0.6, abs=0.015)
