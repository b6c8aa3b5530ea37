"""What every method refuses, with the value and the next step."""

import math

import pytest
import torch

from rac_modifier.errors import RacError
from rac_modifier.pruning.linalg import check_finite
from rac_modifier.settings.pattern import Pattern
from rac_modifier.settings.solvers import SOLVERS
from tests.pruning.solving import solve

TWO, SHARE = Pattern.n_of_m(2, 4), Pattern.unstructured(0.5)
NOT_FINITE, TOGETHER = "is not finite everywhere", "the same N:M, or are all unstructured"


def with_value(tensor: torch.Tensor, value: float) -> torch.Tensor:
    tensor = tensor.clone()
    tensor[1, 1] = value
    return tensor


REFUSED = [
    ({"weights": [torch.ones(3, 12)]}, r"q_proj: weight \[3, 12\] and Hessian \[8, 8\] do not"),
    ({"weights": [torch.ones(8)]}, r"q_proj: weight \[8\]"),
    ({"weights": [with_value(torch.ones(3, 8), math.nan)]}, f"q_proj: the weight {NOT_FINITE}"),
    ({"cross_moment": [with_value(torch.ones(3, 8), math.inf)]}, f"cross moment {NOT_FINITE}"),
    ({"hessian": torch.ones(8, 7)}, r"Hessian \[8, 7\] do not fit together"),
    ({"hessian": with_value(torch.eye(8), math.inf)}, f"q_proj: the Hessian {NOT_FINITE}"),
    ({"hessian": with_value(torch.eye(8), -1.0)}, "diagonal of the Hessian is between -1 and 1"),
    ({"hessian": torch.zeros(8, 8)}, "diagonal of the Hessian is between 0 and 0"),
    ({"pattern": Pattern.n_of_m(1, 3)}, "q_proj.*multiple of 3"),
    (
        {"weights": [torch.ones(3, 8), torch.ones(3, 8).bfloat16()], "names": ["a", "b"]},
        r"b: .*torch\.bfloat16 is next to torch\.float32",
    ),
    *(
        ({"weights": [torch.ones(3, 8)] * 2, "names": ["a", "b"], "pattern": pair}, TOGETHER)
        for pair in ([TWO, Pattern.n_of_m(1, 4)], [SHARE, TWO])
    ),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_every_method_refuses(change, message):
    problem = {"weights": [torch.ones(3, 8)], "hessian": torch.eye(8), "names": ["q_proj"]}
    for solver in SOLVERS:
        with pytest.raises(RacError, match=message):
            solve(**{"solver": solver, "pattern": TWO, **problem, **change})


def test_a_sum_that_overflows_is_no_value_that_is_not_finite():
    check_finite(torch.full((4,), 6e4, dtype=torch.float16), "w", "weight", "")
    for values in ([1.0, math.nan], [math.inf, -math.inf]):
        with pytest.raises(RacError, match="w: the weight is not finite"):
            check_finite(torch.tensor(values), "w", "weight", "")
