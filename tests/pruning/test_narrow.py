"""Products in bfloat16, which any CPU computes and some compute faster."""

import pytest
import torch

from rac_modifier.pruning import Pattern, narrow, solve
from rac_modifier.pruning.masks import holds
from rac_modifier.pruning.statistics import GroupStatistics
from tests.pruning.pruning_reference import correlated_problem, trace_error

choose = narrow.product_dtype  # before a fixture replaces it


@pytest.fixture
def bfloat16_products(monkeypatch):
    def use():
        monkeypatch.setattr(narrow, "product_dtype", lambda device: torch.bfloat16)

    return use


@pytest.mark.parametrize("pattern", [Pattern.n_of_m(2, 4), Pattern.unstructured(0.5), Pattern.unstructured(0.8)])
@pytest.mark.parametrize(("method", "refit"), [("alps", False), ("sparsegpt", True)])
@pytest.mark.parametrize("scales", [0.0, 2.0])
def test_the_error_is_that_of_float32(pattern, method, refit, scales, bfloat16_products):
    weight, hessian = correlated_problem(200, 256, 1000)
    outliers = torch.randn(256, generator=torch.Generator().manual_seed(2)).mul(scales).exp()
    hessian = hessian * outliers * outliers[:, None]  # inputs of very different sizes
    (exact,) = solve(method, [weight], hessian, pattern, refit=refit)
    bfloat16_products()
    (ours,) = solve(method, [weight], hessian, pattern, refit=refit)
    assert not torch.equal(ours.weight, exact.weight)
    assert ours.error == pytest.approx(exact.error, rel=0.015)
    assert ours.error == pytest.approx(trace_error(weight - ours.weight, hessian), rel=1e-3)
    assert int((~ours.mask).sum()) == weight.numel() * pattern.sparsity // 1
    assert holds(ours.weight, pattern)


@pytest.mark.parametrize("rows", [(64,), (600, 20)])
def test_drift_is_off_by_less_than_what_other_tokens_would_change(rows, bfloat16_products):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 2000, 128, generator=generator)
    dense = x + 0.1 * torch.randn(x.shape, generator=generator)
    weights = [torch.randn(r, 128, generator=generator) for r in rows]

    def drifts(part: slice) -> torch.Tensor:
        statistics = GroupStatistics(weights, 128, x.device, drift=True)
        statistics.add(x[part], torch.ones(x[part].shape[:2]), dense[part])
        return torch.cat(statistics.drift())

    exact, half = drifts(slice(None)), drifts(slice(1))
    bfloat16_products()
    rounded = drifts(slice(None))
    assert not torch.equal(rounded, exact)
    assert (rounded - exact).norm() < 0.01 * (half - exact).norm()


def test_the_choice_is_the_devices(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert choose(torch.device("cpu")) == torch.bfloat16
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    assert choose(torch.device("cpu")) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert choose(torch.device("cuda", 0)) == torch.bfloat16
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert choose(torch.device("cuda", 0)) is None
    assert choose(torch.device("meta")) is None


def test_torch_still_tells_what_the_cpu_has():
    assert "avx512_bf16" in torch.cpu.get_capabilities() or torch.cpu.get_capabilities()["architecture"] != "x86_64"
