import pytest
import torch

from rac_modifier.recovery.training_loop import _rate_at, default_learning_rate, plan_steps
from rac_modifier.settings.recovery import RecoverySettings
from tests.recovery.recovery_helpers import sequences

CPU = torch.device("cpu")


def planned(data, device=CPU, processes=1, **settings):
    return plan_steps(data, RecoverySettings(**settings), device, processes)


def lengths(step):
    return [[len(ids) for ids, _ in batch] for batch in step.batches]


def test_the_default_learning_rate_goes_through_what_was_measured():
    assert default_learning_rate(3_400_000) == pytest.approx(1e-3, rel=0.05)
    assert default_learning_rate(135_000_000) == pytest.approx(2e-4, rel=0.01)
    assert 2e-5 < default_learning_rate(7_000_000_000) < 5e-5


def test_the_rate_rises_for_a_tenth_and_falls_to_a_tenth():
    rates = [_rate_at(step, 100) for step in range(100)]
    assert [rates[0], rates[9], rates[99]] == pytest.approx([0.1, 1.0, 0.1])
    assert rates.index(max(rates)) == 9
    assert rates[54] == pytest.approx(0.55, abs=0.01)  # half-way down
    assert [_rate_at(0, 1), _rate_at(0, 2), _rate_at(1, 2)] == pytest.approx([1.0, 1.0, 0.1])


def test_steps_cover_each_pass_in_another_order_and_are_not_sorted_by_length():
    data = sequences(40)
    settings = {"step_tokens": 200, "batch_tokens": 120, "passes": 2}
    steps = planned(data, **settings)
    trained = [s for step in steps for batch in step.batches for s in batch]
    assert all(sum(s is other for other in trained) <= 2 for s in data)
    assert len(trained) >= 2 * len(data) - 20  # at most the rest of a pass is left out
    assert all(step.tokens >= 100 for step in steps)
    for step in steps:
        for batch in lengths(step):
            assert len(batch) == 1 or len(batch) * max(batch) <= 120
    assert steps == planned(data, **settings)
    longest = [max(max(batch) for batch in lengths(step)) for step in steps]
    assert longest != sorted(longest)


def test_a_longer_sequence_begins_a_batch_where_padding_would_cost_more():
    """On a CPU above 64 tokens; a GPU and several processes take any padding."""
    data = [(list(range(n)), 2) for n in (10, 12, 80, 100, 130)]
    settings = {"step_tokens": 1000, "batch_tokens": 4096}
    (step,) = planned(data, **settings)
    assert lengths(step) == [[10, 12], [80, 100, 130]]
    for device, processes in ((torch.device("cuda"), 1), (CPU, 2)):
        (step,) = planned(data, device, processes, **settings)
        assert lengths(step) == [[10, 12, 80, 100, 130]]
    for longer, batches in ((74, [[10, 74]]), (75, [[10], [75]])):
        (step,) = planned([(list(range(n)), 2) for n in (10, longer)], **settings)
        assert lengths(step) == batches


def test_a_batch_may_have_exactly_batch_tokens():
    data = [(list(range(30)), 2)] * 6
    (step,) = planned(data, step_tokens=1000, batch_tokens=90)
    assert lengths(step) == [[30, 30, 30], [30, 30, 30]]


@pytest.mark.parametrize(("step_tokens", "steps"), [(64, 6), (128, 3), (256, 2), (257, 1)])
def test_a_step_has_exactly_its_tokens_and_half_a_step_is_one(step_tokens, steps):
    data = [(list(range(64)), 2)] * 6
    assert len(planned(data, step_tokens=step_tokens)) == steps


def test_each_pass_has_an_order_of_its_own():
    data = [([n] * 64, 2) for n in range(12)]
    steps = planned(data, step_tokens=64, passes=2)
    trained = [ids[0] for step in steps for ((ids, _),) in step.batches]
    first, second = trained[:12], trained[12:]
    assert sorted(first) == sorted(second) == list(range(12))
    assert len({tuple(order) for order in (first, second, range(12))}) == 3


def test_a_small_set_makes_one_step():
    (step,) = planned(sequences(2), step_tokens=10_000)
    assert sum(map(len, step.batches)) == 2
    assert step.completion_tokens == sum(len(ids) - prompt for ids, prompt in sequences(2))
