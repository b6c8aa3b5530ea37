import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rac_modifier.errors import RacError
from rac_modifier.llmcompressor.shares import listed_shares, patterns_for


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
