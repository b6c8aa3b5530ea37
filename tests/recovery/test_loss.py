import pytest
import torch

from rac_modifier.recovery import loss
from rac_modifier.recovery.loss import head_kl


def case(tokens: int = 7, d: int = 5, vocabulary: int = 11):
    generator = torch.Generator().manual_seed(3)
    head = torch.nn.Linear(d, vocabulary, bias=False)
    head.weight.data = torch.randn(vocabulary, d, generator=generator)
    hidden = torch.randn(tokens, d, generator=generator).requires_grad_()
    return hidden, torch.randn(tokens, d, generator=generator), head


def oracle(
    hidden: torch.Tensor, dense: torch.Tensor, weight: torch.Tensor
) -> tuple[float, torch.Tensor]:
    """KL(dense || student) and its gradient by autograd, in float64."""
    h = hidden.detach().double().requires_grad_()
    p = (dense.double() @ weight.double().T).softmax(-1)
    q = (h @ weight.double().T).softmax(-1)
    total = (p * (p.log() - q.log())).sum()
    total.backward()
    return total.item(), h.grad


@pytest.mark.parametrize(
    ("elements", "cached"), [(1 << 25, 1 << 19), (22, 1 << 19), (44, 11), (1 << 25, 22)]
)
def test_loss_and_gradient_are_those_of_the_definition(elements, cached, monkeypatch):
    """In one chunk, and in chunks of two or four tokens with a shorter last one, in parts of one token or two."""
    monkeypatch.setattr(loss, "_CHUNK_ELEMENTS", elements)
    monkeypatch.setattr(loss, "_CACHED_ELEMENTS", cached)
    hidden, dense, head = case()
    found = head_kl(hidden, dense, head)
    (3.0 * found).backward()
    total, gradient = oracle(hidden, dense, head.weight.detach())
    assert found.item() == pytest.approx(total, rel=1e-5)
    torch.testing.assert_close(hidden.grad, (3.0 * gradient).float(), rtol=1e-4, atol=1e-5)
    assert head.weight.grad is None


def test_the_direction_is_dense_to_student():
    """The reverse KL of the same two has another value: a swap would be seen."""
    hidden, dense, head = case()
    forward, backward = (
        head_kl(hidden, dense, head).item(),
        head_kl(dense, hidden.detach(), head).item(),
    )
    assert abs(forward - backward) > 0.05 * forward


def test_equal_states_cost_nothing_and_pull_nowhere():
    hidden, _, head = case()
    found = head_kl(hidden, hidden.detach(), head)
    found.backward()
    assert abs(found.item()) < 1e-6
    assert float(hidden.grad.abs().max()) < 1e-6


def test_a_measurement_multiplies_with_the_head_twice_and_a_step_three_times(monkeypatch):
    """A held-out check needs no gradient, which is a third of the matmuls."""
    calls = []
    matmul = loss.matmul
    monkeypatch.setattr(loss, "matmul", lambda a, b: calls.append(1) or matmul(a, b))
    hidden, dense, head = case()
    measured = head_kl(hidden.detach(), dense, head)
    assert len(calls) == 2
    assert head_kl(hidden, dense, head).item() == measured.item()
    assert len(calls) == 5


def test_logits_that_are_large_cost_no_precision():
    """Both sums of exponentials are near 1,000, and the KL is near 1."""
    hidden, _, head = case()
    weight = torch.cat([head.weight.detach(), torch.full((11, 1), 1000.0)], dim=1)
    one = torch.ones(7, 1)
    head = torch.nn.Linear(6, 11, bias=False)
    head.weight.data = weight
    student, dense = (
        torch.cat([hidden.detach(), one], 1),
        torch.cat([hidden.detach().flip(0), one], 1),
    )
    total, _ = oracle(student, dense, weight)
    assert head_kl(student, dense, head).item() == pytest.approx(total, rel=1e-3)
