import contextlib

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from rac_modifier.errors import RacError
from rac_modifier.recovery import loss
from rac_modifier.recovery.loss import (
    check_head,
    head_kl,
    output_head,
    predicting_states,
    targets,
)
from tests.recovery.recovery_helpers import dense_and_sparse, sequences


def test_states_are_those_that_predict_completion_tokens_in_order():
    dense, _ = dense_and_sparse()
    data = sequences(3)
    states = predicting_states(dense, data)
    whole = [(dense.model(torch.tensor([ids])).last_hidden_state[0], n) for ids, n in data]
    expected = [state[n - 1 : -1] for state, n in whole]
    torch.testing.assert_close(states, torch.cat(expected), rtol=1e-4, atol=1e-5)
    states.sum().backward()
    assert float(dense.model.layers[0].self_attn.q_proj.weight.grad.abs().sum()) > 0


def test_a_plain_head_is_accepted_a_capped_one_and_a_bias_are_refused():
    dense, _ = dense_and_sparse()
    check_head(dense, sequences(1)[0])
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "head_dim": 16}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    torch.manual_seed(0)
    capped = Gemma2Config(**sizes, **heads, final_logit_softcapping=3.0, initializer_range=0.4)
    with pytest.raises(RacError, match="changes its logits after the output head"):
        check_head(Gemma2ForCausalLM(capped).eval(), sequences(1)[0])
    dense.set_output_embeddings(torch.nn.Linear(64, 300, bias=True))
    with pytest.raises(RacError, match="no plain linear output head"):
        output_head(dense)


@pytest.mark.parametrize(("factor", "refused"), [(1.015, False), (1.03, True)])
def test_logits_may_differ_by_two_hundredths_of_the_largest(factor, refused):
    def scaled(_model, _args, output):
        output.logits = factor * output.logits

    dense, _ = dense_and_sparse()
    dense.lm_head.weight.data.mul_(10)
    dense.register_forward_hook(scaled)
    with pytest.raises(RacError) if refused else contextlib.nullcontext():
        check_head(dense, sequences(1)[0])


def case(tokens: int = 7, d: int = 5, vocabulary: int = 11):
    head = torch.nn.Linear(d, vocabulary, bias=False)
    head.weight.data = torch.randn(vocabulary, d)
    return torch.randn(tokens, d).requires_grad_(), torch.randn(tokens, d), head


def oracle(hidden, dense, weight):
    """KL(dense || student) and its gradient by autograd, in float64."""
    h = hidden.detach().double().requires_grad_()
    p = (dense.double() @ weight.double().T).softmax(-1)
    q = (h @ weight.double().T).softmax(-1)
    total = (p * (p.log() - q.log())).sum()
    total.backward()
    return total.item(), h.grad


@pytest.mark.parametrize(
    ("elements", "cached", "chunks"),
    [(1 << 25, 1 << 19, 1), (44, 22, 2), (1 << 25, 11, 1), (5, 11, 7)],
)
def test_loss_and_gradient_are_those_of_the_definition(elements, cached, chunks, monkeypatch):
    """In one chunk, in chunks of four tokens with a shorter last one, by one token or two."""
    monkeypatch.setattr(loss, "_CHUNK_ELEMENTS", elements)
    monkeypatch.setattr(loss, "_CACHED_ELEMENTS", cached)
    products, sizes, softmax = [], [], torch.Tensor.softmax
    monkeypatch.setattr(loss, "matmul", lambda a, b: products.append(len(a)) or a @ b)
    hidden, dense, head = case()
    with monkeypatch.context() as patch:
        patch.setattr(
            torch.Tensor, "softmax", lambda x, d: sizes.append(x.numel()) or softmax(x, d)
        )
        kl = head_kl(hidden, dense, head)
    assert len(products) == 3 * chunks
    assert max(sizes) <= cached
    (3.0 * kl).backward()
    total, gradient = oracle(hidden, dense, head.weight.detach())
    assert kl.item() == pytest.approx(total, rel=1e-5)
    torch.testing.assert_close(hidden.grad, (3.0 * gradient).float(), rtol=1e-4, atol=1e-5)
    assert head.weight.grad is None
    assert head_kl(hidden.detach(), dense, head).item() == kl.item()


def test_logits_that_are_large_cost_no_precision():
    """Both sums of exponentials are near 1,000, and the KL is near 1."""
    hidden, _, head = case()
    ones, hidden = torch.ones(7, 1), hidden.detach()
    weight = torch.cat([head.weight.detach(), torch.full((11, 1), 1000.0)], dim=1)
    head = torch.nn.Linear(6, 11, bias=False)
    head.weight.data = weight
    student, dense = (torch.cat([x, ones], 1) for x in (hidden, hidden.flip(0)))
    total, _ = oracle(student, dense, weight)
    assert head_kl(student, dense, head).item() == pytest.approx(total, rel=1e-3)


def test_a_third_copy_is_trained_towards_the_first_one_with_a_tenth_of_its_odds():
    """Prompt (1, 2), then 3 and 22 times (4, 5, 6): twenty copies have rows of the first one."""
    copying = ((1, 2, 3, *(4, 5, 6) * 22), 2)
    plain = ((1, 9, 8, 7), 1)
    rows, copied = targets([plain, copying])
    assert rows.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, *(4, 5, 6) * 20]
    assert copied.tolist() == [-1] * 10 + [4, 5, 6] * 20

    hidden, dense, head = case()
    copied = torch.tensor([-1, 3, -1, 0, 10, -1, -1])
    probabilities = (dense.double() @ head.weight.detach().double().T).softmax(-1)
    for row, token in enumerate(copied.tolist()):
        if token >= 0:
            probabilities[row, token] /= 10
    expected = probabilities / probabilities.sum(-1, keepdim=True)
    q = (hidden.detach().double() @ head.weight.detach().double().T).softmax(-1)
    kl = head_kl(hidden, dense, head, copied)
    total = (expected * (expected.log() - q.log())).sum()
    assert kl.item() == pytest.approx(float(total), rel=1e-5)
    kl.backward()
    gradient = (q - expected) @ head.weight.detach().double()
    torch.testing.assert_close(hidden.grad, gradient.float(), rtol=1e-4, atol=1e-5)
