import math
import subprocess
import sys
from typing import get_args

import pytest
import torch

from rac_modifier.errors import RacError
from rac_modifier.pruning import Method, Pattern, solve
from rac_modifier.pruning.methods import METHODS
from rac_modifier.pruning.solve import quadratic_form

PATTERN = Pattern.n_of_m(2, 4)


def with_value(tensor: torch.Tensor, value: float) -> torch.Tensor:
    tensor = tensor.clone()
    tensor[1, 1] = value
    return tensor


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "obs"}, "'obs': unknown; choose from sparsegpt, alps, wanda, magnitude"),
        ({"block_size": 0}, "block_size 0"),
        ({"dampening_frac": -0.1}, "dampening_frac -0.1"),
        ({"dampening_frac": math.nan}, "dampening_frac nan"),
        ({"iterations": 0}, "iterations 0"),
        ({"refit_steps": -1}, "refit_steps -1"),
        ({"weights": []}, "0 weights"),
        ({"names": ["a", "b"]}, "2 names"),
        ({"target": [torch.ones(2, 8)]}, r"q_proj: weight \[3, 8\], target \[2, 8\]"),
        ({"weights": [torch.ones(3, 12)]}, r"q_proj: weight \[3, 12\]"),
        ({"weights": [torch.ones(8)]}, r"q_proj: weight \[8\]"),
        ({"weights": [with_value(torch.ones(3, 8), math.nan)]}, "q_proj: the weight holds values that are not finite"),
        ({"target": [with_value(torch.ones(3, 8), math.inf)]}, "q_proj: the target holds values that are not finite"),
        ({"hessian": torch.ones(8, 7)}, "must be square"),
        ({"hessian": torch.eye(8).bfloat16()}, "float32"),
        ({"hessian": with_value(torch.eye(8), math.inf)}, "q_proj: the Hessian holds values that are not finite"),
        ({"hessian": with_value(torch.eye(8), -1.0)}, "diagonal runs from -1 to 1"),
        ({"hessian": torch.zeros(8, 8)}, "diagonal runs from 0 to 0"),
        ({"pattern": Pattern.n_of_m(1, 3)}, "q_proj.*multiple of 3"),
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_refuses(method, change, message):
    arguments = {
        "method": method,
        "weights": [torch.ones(3, 8)],
        "hessian": torch.eye(8),
        "pattern": PATTERN,
        "names": ["q_proj"],
        **change,
    }
    with pytest.raises(RacError, match=message):
        solve(**arguments)


def test_every_method_is_registered():
    assert set(METHODS) == set(get_args(Method))


def test_refuses_mixed_dtypes():
    with pytest.raises(RacError, match=r"weight 1: torch\.bfloat16 beside torch\.float32"):
        solve("wanda", [torch.ones(3, 8), torch.ones(3, 8).bfloat16()], torch.eye(8), PATTERN)


def test_overflow_of_the_stored_dtype_is_an_error():
    hessian = torch.tensor([[1.0, -0.99], [-0.99, 1.0]])  # pruning the first input doubles the other's weight
    weight = torch.tensor([[-5e4, 6e4]]).half()
    with pytest.raises(RacError, match=r"weight 0: the pruned weight overflows torch\.float16"):
        solve("sparsegpt", [weight], hessian, Pattern.n_of_m(1, 2))


def test_large_half_weights_are_finite():
    weight = torch.full((4, 64), 6e4, dtype=torch.float16)  # whose sum is not
    (solution,) = solve("magnitude", [weight], torch.eye(64), PATTERN)
    assert int(solution.mask.sum()) == 128


def test_weights_of_zero():
    for method in METHODS:
        (solution,) = solve(method, [torch.zeros(2, 8)], torch.eye(8), PATTERN)
        assert (solution.error, solution.relative_error) == (0.0, 0.0)
        assert int(solution.mask.sum()) == (0 if method == "keep" else 8)


def test_keep_prunes_what_is_zero_already_and_fits_the_rest_to_the_target():
    x = torch.randn(200, 16, generator=torch.Generator().manual_seed(0))
    hessian, weight = x.T @ x, torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    weight[:, ::2] = 0.0
    (same,) = solve("keep", [weight], hessian, PATTERN)
    torch.testing.assert_close(same.weight, weight)
    target = weight + 0.1 * torch.randn(3, 16, generator=torch.Generator().manual_seed(2))
    (fitted,) = solve("keep", [weight], hessian, PATTERN, target=[target], dampening_frac=0.0)
    assert torch.equal(fitted.mask, weight != 0)
    assert torch.equal(fitted.weight != 0, fitted.mask)
    kept = x[:, 1::2]  # the least squares on what is kept
    expected = torch.linalg.lstsq(kept, x @ target.T).solution.T
    torch.testing.assert_close(fitted.weight[:, 1::2], expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("d", [1, 255, 256, 600])
def test_quadratic_form(d):
    x, v = torch.randn(50, d), torch.randn(d, 5)
    hessian = x.T @ x
    expected = torch.einsum("ir,ij,jr->r", v.double(), hessian.double(), v.double())
    torch.testing.assert_close(quadratic_form(v, hessian), expected, rtol=1e-4, atol=1e-4)


def test_import_brings_no_compressor():
    code = (
        "import sys, rac_modifier.pruning as p; p.solve; p.Hessian; p.Pattern; "
        "assert not {'llmcompressor', 'vllm', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
