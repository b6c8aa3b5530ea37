"""What every method refuses, with the value and the next step."""

import math
from typing import get_args

import pytest
import torch

from rac_modifier.errors import RacError
from rac_modifier.pruning import Method, Pattern, solve
from rac_modifier.pruning.checks import is_finite


def with_value(tensor: torch.Tensor, value: float) -> torch.Tensor:
    tensor = tensor.clone()
    tensor[1, 1] = value
    return tensor


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "obs"}, "'obs': unknown; choose from sparsegpt, alps, wanda, magnitude, keep"),
        ({"block_size": 0}, "block_size 0: must be at least 1; 128 is usual"),
        ({"dampening_frac": -0.1}, "dampening_frac -0.1: must be finite and >= 0; 0.01 is usual"),
        ({"dampening_frac": math.nan}, "dampening_frac nan"),
        ({"dampening_frac": math.inf}, "dampening_frac inf"),
        ({"iterations": 0}, "iterations 0: ALPS needs at least 1; 12 is usual"),
        ({"refit_steps": -1}, "refit_steps -1: must not be negative; 10 is usual"),
        ({"weights": []}, "0 weights, 1 names: give one of each per module"),
        ({"names": ["a", "b"]}, "1 weights, 2 names"),
        (
            {"weights": [torch.ones(3, 12)]},
            r"q_proj: weight \[3, 12\] and a Hessian of 8 inputs do not fit together",
        ),
        ({"weights": [torch.ones(8)]}, r"q_proj: weight \[8\]"),
        (
            {"weights": [with_value(torch.ones(3, 8), math.nan)]},
            "q_proj: the weight holds values that are not finite",
        ),
        ({"cross_moment": []}, "0 cross moments, 1 weights: give one of each per module"),
        (
            {"cross_moment": [torch.ones(2, 8)]},
            r"q_proj: cross moment \[2, 8\] and weight \[3, 8\] must have the same",
        ),
        (
            {"cross_moment": [with_value(torch.ones(3, 8), math.inf)]},
            "q_proj: the cross moment holds values .* finite",
        ),
        (
            {"hessian": torch.ones(8, 7)},
            r"q_proj: Hessian \[8, 7\] of torch\.float32; it must be square and float32",
        ),
        ({"hessian": torch.eye(8).bfloat16()}, "of torch.bfloat16; it must be square and float32"),
        (
            {"hessian": with_value(torch.eye(8), math.inf)},
            "q_proj: the Hessian holds values that are not finite",
        ),
        (
            {"hessian": with_value(torch.eye(8), -1.0)},
            "diagonal of the Hessian is between -1 and 1",
        ),
        ({"hessian": torch.zeros(8, 8)}, "diagonal of the Hessian is between 0 and 0"),
        ({"pattern": Pattern.n_of_m(1, 3)}, "q_proj.*multiple of 3"),
        ({"pattern": []}, "q_proj: 0 patterns"),
    ],
)
@pytest.mark.parametrize("method", get_args(Method))
def test_refuses(method, change, message):
    arguments = {
        "method": method,
        "weights": [torch.ones(3, 8)],
        "hessian": torch.eye(8),
        "pattern": Pattern.n_of_m(2, 4),
        "names": ["q_proj"],
        **change,
    }
    with pytest.raises(RacError, match=message):
        solve(**arguments)


def test_refuses_mixed_dtypes():
    with pytest.raises(RacError, match=r"weight 1: torch\.bfloat16 beside torch\.float32"):
        solve(
            "wanda",
            [torch.ones(3, 8), torch.ones(3, 8).bfloat16()],
            torch.eye(8),
            Pattern.n_of_m(2, 4),
        )


@pytest.mark.parametrize(
    "patterns",
    [
        [Pattern.n_of_m(2, 4), Pattern.n_of_m(1, 4)],
        [Pattern.unstructured(0.5), Pattern.n_of_m(2, 4)],
    ],
)
def test_refuses_modules_with_different_structures(patterns):
    with pytest.raises(
        RacError, match=r"2 patterns with mask_structure .*: the same N:M, or all unstructured"
    ):
        solve("magnitude", [torch.ones(3, 8)] * 2, torch.eye(8), patterns)


def test_one_sparsity_per_module_is_allowed():
    patterns = [Pattern.unstructured(0.25), Pattern.unstructured(0.75)]
    solutions = solve("magnitude", [torch.arange(16.0).view(2, 8)] * 2, torch.eye(8), patterns)
    assert [int((~s.mask).sum()) for s in solutions] == [4, 12]


def test_a_sum_that_overflows_is_no_value_that_is_not_finite():
    assert is_finite(torch.full((4,), 6e4, dtype=torch.float16))
    assert not is_finite(torch.tensor([1.0, math.nan]))
    assert not is_finite(torch.tensor([math.inf, -math.inf]))
