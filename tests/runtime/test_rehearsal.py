"""Bytes that live in work that is rehearsed."""

import pytest
import torch

from rac_modifier.measure.teacher_forcing import input_of_head
from rac_modifier.runtime.models import LiveBytes, widened_peak, without_data
from tests.tiny import tiny_model


def test_what_is_freed_counts_no_longer():
    with LiveBytes() as live:
        first = torch.ones(100)
        second = first + 1
        del first
        third = second.view(10, 10)  # no bytes of its own
        second.mul_(2)
    assert (live.now, live.peak) == (400, 800)
    assert len(third) == 10


@pytest.mark.parametrize(("columns", "multiple"), [(300, 1), (4096, 1), (5000, 48)])
def test_a_wide_problem_is_extrapolated(columns, multiple):
    """A matrix and a block of 128 rows: a w^2 + b w."""
    widths = []

    def rehearse(width):
        widths.append(width)
        return 4 * (2 * width**2 + 128 * width)

    expected = 4 * (2 * columns**2 + 128 * columns)
    assert widened_peak(rehearse, columns, multiple) == pytest.approx(expected, rel=1e-6)
    assert columns in widths or all(width % multiple == 0 and width <= 1024 for width in widths)


def test_a_model_without_data_runs_and_the_model_itself_is_untouched():
    model = tiny_model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    with without_data(model) as fake, torch.no_grad(), LiveBytes() as live:
        states = input_of_head(fake, torch.zeros(2, 50, dtype=torch.long))
        assert states.shape == (2, 50, 64)
    assert live.peak > 2 * 50 * 64 * 4
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
