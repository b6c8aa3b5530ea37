import copy

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from rac_modifier.errors import RacError
from rac_modifier.evaluation import dense_reference
from rac_modifier.evaluation.dense_reference import DenseReference
from rac_modifier.evaluation.divergence import divergence
from tests.tiny import linears, tiny_model


def sequences(vocabulary: int = 300):
    generator = torch.Generator().manual_seed(1)
    lengths = ((30, 9), (52, 10), (75, 4), (21, 20))
    return [
        (torch.randint(2, vocabulary, (n,), generator=generator).tolist(), prompt)
        for n, prompt in lengths
    ]


def shaken(model, scale: float = 0.03):
    other = copy.deepcopy(model)
    torch.manual_seed(7)
    for module in linears(other).values():
        module.weight.data.add_(torch.randn_like(module.weight) * scale)
    return other


def softcapped():
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        final_logit_softcapping=3.0,
        initializer_range=0.4,
    )
    return Gemma2ForCausalLM(config).eval()


@pytest.mark.parametrize("make", [tiny_model, softcapped])
@pytest.mark.parametrize("elements", [None, 4000])
def test_the_same_as_with_both_models_at_hand(make, elements, monkeypatch):
    """Also where the logits are capped behind the head, and where they are computed window by window."""
    dense = make()
    pruned = shaken(dense)
    expected = divergence(dense, pruned, sequences(), label="x", bins=8, progress=False)
    if elements:
        monkeypatch.setattr(dense_reference, "WINDOW_ELEMENTS", elements)
    reference = DenseReference(dense, sequences(), batch_tokens=160)
    found = reference.divergence(pruned, label="x")
    assert reference.tokens == found.tokens == expected.tokens
    assert found.kl == pytest.approx(expected.kl, rel=1e-3)
    assert found.kl > 1e-3
    assert found.agreement == expected.agreement
    assert [b.kl for b in found.bins] == pytest.approx([b.kl for b in expected.bins], rel=2e-3)


def test_the_dense_model_itself_does_not_diverge():
    model = tiny_model()
    found = DenseReference(model, sequences()).divergence(model, label="x")
    assert found.kl == pytest.approx(0.0, abs=1e-6)
    assert found.agreement == 1.0


def test_the_logits_in_memory_at_once_are_bounded_and_the_bound_is_used(monkeypatch):
    """Both models' logits count: 20 positions of one sequence and 300 tokens, twice."""
    model, sizes = tiny_model(), []
    monkeypatch.setattr(dense_reference, "WINDOW_ELEMENTS", 2 * 20 * 300)
    reference = DenseReference(model, sequences(), batch_tokens=1)
    model.lm_head.register_forward_hook(lambda module, args, output: sizes.append(output.numel()))
    reference.divergence(model, label="x")
    assert max(sizes) == 2 * 20 * 300


def test_it_leaves_the_model_as_it_was():
    model = tiny_model().train()
    DenseReference(model, sequences()).divergence(model, label="x")
    assert model.training
    assert not model.get_output_embeddings()._forward_pre_hooks


def test_a_changed_head_is_refused():
    model = tiny_model()
    reference = DenseReference(model, sequences())
    model.lm_head.weight.data.mul_(1.01)
    with pytest.raises(RacError, match="the output head was changed too"):
        reference.divergence(model, label="x")


def test_a_model_without_an_output_head_is_refused():
    model = tiny_model()
    model.get_output_embeddings = lambda: None
    with pytest.raises(RacError, match="Qwen3ForCausalLM has no output embeddings"):
        DenseReference(model, sequences())


def test_a_head_that_the_model_does_not_call_is_refused():
    model = tiny_model()
    model.get_output_embeddings = lambda: torch.nn.Linear(64, 300)
    with pytest.raises(RacError, match="does not call its output embeddings"):
        DenseReference(model, sequences())
