import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Gemma2Config, Gemma2ForCausalLM, MambaConfig, MambaForCausalLM

from rac_modifier.errors import RacError
from rac_modifier.measure import divergence as module
from rac_modifier.measure.divergence import (
    DenseReference,
    DivergenceResult,
    RunDivergence,
    TokenDivergence,
    token_divergence,
)
from tests.tiny import linears, tiny_model

VOCABULARY = 300


def sequences_of(*lengths_and_prompts):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randint(2, VOCABULARY, (n,), generator=generator).tolist(), p)
        for n, p in lengths_and_prompts
    ]


def sequences():
    return sequences_of((30, 9), (52, 10), (75, 4), (21, 20))


SEQUENCES = sequences_of((2, 1), (40, 3), (17, 16), (5, 1), (33, 20))


@pytest.fixture(scope="module")
def dense():
    return tiny_model()


@pytest.fixture(scope="module")
def pruned(dense):
    return shaken(dense)


def shaken(model, scale: float = 0.03):
    other = copy.deepcopy(model)
    torch.manual_seed(7)
    for linear in linears(other).values():
        linear.weight.data.add_(torch.randn_like(linear.weight) * scale)
    return other


def divergence(dense, pruned, sequences, label="x"):
    return DenseReference(dense, sequences).divergence(pruned, label=label)


def reference(dense, pruned, sequences):
    """KL and agreement of every completion token, one sequence at a time, in float64."""
    kls, agrees = [], []
    with torch.no_grad():
        for ids, prompt in sequences:
            p, q = (
                m(torch.tensor([ids])).logits[0, prompt - 1 : -1].double().log_softmax(-1)
                for m in (dense, pruned)
            )
            kls.append((p.exp() * (p - q)).sum(-1))
            agrees.append((p.argmax(-1) == q.argmax(-1)).double())
    return kls, agrees


def test_models_of_other_dtypes_and_in_training_mode(dense):
    half = copy.deepcopy(dense).to(torch.bfloat16).train()
    actual = divergence(dense, half, SEQUENCES)
    assert 0 < actual.kl < 0.01
    assert half.training
    assert not dense.training


@given(st.integers(1, 6), st.integers(2, 9), st.integers(1, 20), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_kl_and_agreement_of_any_logits(n, vocabulary, step, seed):
    generator = torch.Generator().manual_seed(seed)
    p, q = (8 * torch.randn(n, vocabulary, generator=generator) for _ in range(2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_STEP_ELEMENTS", step)
        kl, agrees = token_divergence(p, q)
    a, b = p.double().log_softmax(-1), q.double().log_softmax(-1)
    torch.testing.assert_close(kl, (a.exp() * (a - b)).sum(-1), rtol=1e-4, atol=1e-5)
    assert (kl > -1e-5).all()
    assert agrees.tolist() == (p.argmax(-1) == q.argmax(-1)).tolist()


def test_bad_input(dense, pruned):
    broken = copy.deepcopy(dense)
    broken.model.norm.weight.data[3] = float("nan")
    for model, sequences, message in (
        (pruned, [], "no sequences"),
        (pruned, [([1, 2], 0)], "prompt_length 0"),
        (pruned, [([1, 300], 1)], r"token id 300 is beyond a model's vocabulary of 300"),
        (tiny_model(vocab_size=320), SEQUENCES, "x: a vocabulary of 320 tokens, the dense .* 300"),
        (broken, SEQUENCES, r"x: the logits .* are not finite"),
    ):
        with pytest.raises(RacError, match=message):
            divergence(dense, model, sequences)


def test_the_summary_is_over_tokens_not_over_sequences():
    rows = [TokenDivergence([0.5, 0.1, 0.3], [True, True, False]), TokenDivergence([0.2], [True])]
    actual = DivergenceResult.of(rows, "2:4")
    assert (actual.sequences, actual.tokens, actual.agreement) == (2, 4, 0.75)
    assert actual.kl == pytest.approx(1.1 / 4)
    assert actual.kl_stderr is None  # of two completions


def softcapped():
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "head_dim": 16}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    caps = {"final_logit_softcapping": 3.0, "initializer_range": 0.4}
    return Gemma2ForCausalLM(Gemma2Config(**sizes, **heads, **caps)).eval()


@pytest.mark.parametrize("make", [tiny_model, softcapped])
@pytest.mark.parametrize("elements", [None, 4000])
def test_a_row_per_sequence_in_their_order(make, elements, monkeypatch):
    """Also with logits capped behind the head, and computed window by window."""
    dense = make()
    pruned = shaken(dense)
    kls, agrees = reference(dense, pruned, sequences())
    if elements:
        monkeypatch.setattr(module, "WINDOW_ELEMENTS", elements)
    monkeypatch.setattr(module, "BATCH_TOKENS", 160)
    rows = DenseReference(dense.train(), sequences()).divergence_per_token(pruned.train(), "x")
    assert [len(row.kl) for row in rows] == [21, 42, 71, 1]
    for row, kl, agree in zip(rows, kls, agrees, strict=True):
        torch.testing.assert_close(torch.tensor(row.kl).double(), kl, rtol=1e-3, atol=1e-6)
        assert row.agrees == agree.bool().tolist()
    assert dense.training
    assert pruned.training
    assert not pruned.get_output_embeddings()._forward_hooks


def test_a_model_without_a_key_value_cache_is_measured_in_one_window(monkeypatch):
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 1}
    dense = MambaForCausalLM(MambaConfig(**sizes)).eval()
    pruned = shaken(dense)
    kls, _ = reference(dense, pruned, SEQUENCES)
    result = divergence(dense, pruned, SEQUENCES)
    assert result.kl == pytest.approx(torch.cat(kls).mean().item(), rel=1e-3)
    monkeypatch.setattr(module, "WINDOW_ELEMENTS", 4000)
    with pytest.raises(RacError, match="MambaForCausalLM keeps no key-value cache, so sequences"):
        divergence(dense, pruned, SEQUENCES)


@pytest.mark.parametrize("make", [tiny_model, softcapped])
def test_a_head_that_changes_in_place_is_compared_with_the_dense_one(make):
    dense, model = make(), make()
    inputs = DenseReference(model, sequences())
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1.3)
    kls, _ = reference(dense, model, sequences())
    result = inputs.divergence(model, label="x")
    assert result.kl == pytest.approx(torch.cat(kls).mean().item(), rel=1e-3)
    assert result.kl > 1e-3


def test_the_logits_in_memory_are_bounded_and_the_bound_is_used(dense, monkeypatch):
    """20 positions of a sequence and 300 tokens; both models' logits count."""
    sizes = []
    monkeypatch.setattr(module, "WINDOW_ELEMENTS", 2 * 20 * VOCABULARY)
    monkeypatch.setattr(module, "BATCH_TOKENS", 1)
    expected = DenseReference(dense, sequences())
    handle = dense.lm_head.register_forward_hook(lambda m, a, output: sizes.append(output.numel()))
    result = expected.divergence(dense, label="x")
    assert (result.kl, result.agreement) == (pytest.approx(0.0, abs=1e-6), 1.0)
    handle.remove()
    assert max(sizes) == 20 * VOCABULARY  # of the pruned model alone


def test_a_model_that_does_not_call_its_head_is_refused():
    model = tiny_model()
    model.get_output_embeddings = lambda: torch.nn.Linear(64, 300)
    with pytest.raises(RacError, match="does not call its output embeddings"):
        DenseReference(model, sequences())


def test_a_run_that_measures_nothing_says_why_and_goes_on():
    def reason(held_out, model, off_policy=False):
        record = RunDivergence(model, held_out, off_policy=off_policy).measure(model)
        assert record.keys() == {"not_measured"}
        return record["not_measured"]

    assert "no traces were held out" in reason([], tiny_model())
    assert "may be another model's" in reason(sequences(), tiny_model(), off_policy=True)
    headless = tiny_model()
    headless.get_output_embeddings = lambda: None
    assert "no output embeddings" in reason(sequences(), headless)
