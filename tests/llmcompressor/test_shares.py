import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rac_modifier.errors import RacError
from rac_modifier.llmcompressor.shares import Sensitivity, listed_shares, patterns_for, sensitive_shares


@given(
    st.lists(st.tuples(st.integers(2, 5000), st.floats(0.0, 1.0)), min_size=1, max_size=12),
    st.floats(0.05, 0.95),
)
@settings(max_examples=200, deadline=None)
def test_the_total_is_exact_to_the_weight(modules, sparsity):
    sizes = {f"m{i}": size for i, (size, _) in enumerate(modules)}
    shares = {f"m{i}": share for i, (_, share) in enumerate(modules)}
    budget = int(sum(sizes.values()) * sparsity)
    if not len(sizes) <= budget <= sum(sizes.values()) - len(sizes):
        return
    patterns = patterns_for(shares, sizes, sparsity)
    # as the solvers count
    assert sum(int(sizes[name] * pattern.sparsity) for name, pattern in patterns.items()) == budget


def test_shares_that_fit_are_kept():
    sizes = {"a": 100, "b": 300}
    patterns = patterns_for({"a": 0.8, "b": 0.4}, sizes, 0.5)
    assert {n: int(sizes[n] * p.sparsity) for n, p in patterns.items()} == {"a": 80, "b": 120}


def test_modules_off_the_list_take_what_is_missing():
    assert listed_shares({"a": 0.8}, {"a": 100, "b": 300, "c": 100}, 0.5) == pytest.approx(
        {"a": 0.8, "b": 0.425, "c": 0.425}
    )
    assert listed_shares({"a": 0.8, "b": 0.4}, {"a": 100, "b": 300}, 0.5) == {"a": 0.8, "b": 0.4}


def test_a_list_that_cannot_average_is_refused():
    with pytest.raises(RacError, match=r"names every module and prunes 0\.7500"):
        listed_shares({"a": 0.75, "b": 0.75}, {"a": 10, "b": 10}, 0.5)
    with pytest.raises(RacError, match=r"a share of -0\.300"):
        listed_shares({"a": 0.9}, {"a": 300, "b": 100}, 0.6)


def sensitivity(scores: torch.Tensor, kl: float, sparsity: float) -> Sensitivity:
    ordered = scores.sort().values
    at = torch.linspace(0, len(ordered) - 1, 256).long()
    return Sensitivity(len(ordered), kl, ordered[at].tolist(), float(ordered[: int(len(ordered) * sparsity)].sum()))


def test_half_way_to_one_threshold_of_priced_scores():
    """The optimum by brute force: sort all scores, each times its module's price, and prune the lowest."""
    generator = torch.Generator().manual_seed(0)
    scores = {n: torch.randn(4000 * (i + 1), generator=generator).square() for i, n in enumerate("abc")}
    kls = {"a": 0.5, "b": 0.02, "c": 0.1}
    found = {n: sensitivity(scores[n], kls[n], 0.6) for n in scores}
    priced = {n: scores[n] * kls[n] / found[n].lost for n in scores}
    everything = torch.cat(list(priced.values()))
    threshold = everything.kthvalue(int(len(everything) * 0.6)).values
    shares = sensitive_shares(found, 0.6)
    for name in scores:
        best = float((priced[name] <= threshold).float().mean())
        assert shares[name] == pytest.approx((0.6 + best) / 2, abs=0.01), name
    assert shares["a"] < 0.6 < shares["b"]
    total = sum(shares[n] * len(scores[n]) for n in scores) / len(everything)
    assert total == pytest.approx(0.6, abs=1e-3)


def test_modules_that_are_alike_stay_uniform():
    same = sensitivity(torch.arange(1.0, 1001.0), 0.1, 0.5)
    assert sensitive_shares({"a": same, "b": same}, 0.5) == pytest.approx({"a": 0.5, "b": 0.5}, abs=1e-3)
