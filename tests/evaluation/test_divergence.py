import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rac_modifier.errors import RacError
from rac_modifier.evaluation import divergence as module
from rac_modifier.evaluation.divergence import (
    TokenDivergence,
    divergence,
    summarise_divergence,
    token_divergence,
)
from tests.tiny import linears, tiny_model

VOCABULARY = 300


def sequences_of(*lengths_and_prompts, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randint(0, VOCABULARY, (n,), generator=generator).tolist(), p)
        for n, p in lengths_and_prompts
    ]


SEQUENCES = sequences_of((2, 1), (40, 3), (17, 16), (5, 1), (33, 20))


@pytest.fixture(scope="module")
def dense():
    return tiny_model()


@pytest.fixture(scope="module")
def pruned(dense):
    model = copy.deepcopy(dense)
    for linear in linears(model).values():
        weight = linear.weight.data
        weight[weight.abs() < weight.abs().median()] = 0.0
    return model


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


@pytest.mark.parametrize(
    ("batch_tokens", "window"), [(1, 1), (64, 7 * VOCABULARY), (4096, 1 << 26)]
)
def test_against_one_sequence_at_a_time(dense, pruned, batch_tokens, window, monkeypatch):
    monkeypatch.setattr(module, "BATCH_TOKENS", batch_tokens)
    monkeypatch.setattr(module, "WINDOW_ELEMENTS", window)
    actual = divergence(dense, pruned, SEQUENCES, label="x", bins=5, progress=False)
    kls, agrees = reference(dense, pruned, SEQUENCES)
    assert (actual.sequences, actual.tokens) == (5, 1 + 37 + 1 + 4 + 13)
    assert actual.kl == pytest.approx(torch.cat(kls).mean().item(), rel=1e-4)
    assert actual.kl > 0.01
    assert actual.agreement == pytest.approx(torch.cat(agrees).mean().item())
    assert 0 < actual.agreement < 1
    assert [(b.start, b.end) for b in actual.bins] == [
        (0, 8),
        (8, 16),
        (16, 24),
        (24, 32),
        (32, 40),
    ]
    for b in actual.bins:
        part = torch.cat([k[b.start : b.end] for k in kls])
        assert (b.tokens, b.kl) == (len(part), pytest.approx(part.mean().item(), rel=1e-4))


def test_the_logits_held_at_once_are_bounded(dense, monkeypatch):
    sizes = []
    handle = dense.lm_head.register_forward_hook(lambda m, a, output: sizes.append(output.numel()))
    monkeypatch.setattr(module, "WINDOW_ELEMENTS", 20 * VOCABULARY)
    actual = divergence(dense, dense, SEQUENCES, label="x", progress=False)
    handle.remove()
    assert (actual.kl, actual.agreement) == (0.0, 1.0)
    assert max(sizes) <= 20 * VOCABULARY


def test_models_of_other_dtypes_and_in_training_mode(dense):
    half = copy.deepcopy(dense).to(torch.bfloat16).train()
    actual = divergence(dense, half, SEQUENCES, label="bf16", progress=False)
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
        (pruned, [([1, 300], 1)], r"token id 300, beyond the vocabulary of the dense model \(300"),
        (tiny_model(vocab_size=320), SEQUENCES, "x: a vocabulary of 320 tokens, the dense .* 300"),
        (broken, SEQUENCES, r"x: the logits .* are not finite"),
    ):
        with pytest.raises(RacError, match=message):
            divergence(dense, model, sequences, label="x", progress=False)


values = st.floats(0, 50)
rows_of_any_length = st.lists(st.lists(values, min_size=1, max_size=40), min_size=1, max_size=8)


def result(rows=((0.5, 0.1, 0.3), (0.2,)), label="2:4, RAC", bins=2):
    return summarise_divergence(
        [TokenDivergence(row, [k < 0.25 for k in row]) for row in rows],
        label=label,
        bins=bins,
        seconds=1.5,
    )


def test_summary():
    actual = result()
    assert (actual.sequences, actual.tokens) == (2, 4)
    assert actual.kl == pytest.approx(1.1 / 4)
    assert actual.agreement == 0.5
    assert [(b.start, b.end, b.sequences, b.tokens) for b in actual.bins] == [
        (0, 2, 2, 3),
        (2, 4, 1, 1),
    ]
    assert [b.kl for b in actual.bins] == pytest.approx([0.8 / 3, 0.3])
    assert [b.agreement for b in actual.bins] == pytest.approx([2 / 3, 0.0])
    assert actual.kl_stderr is None  # of two completions


@given(rows_of_any_length, st.integers(1, 20))
def test_bins_partition_the_tokens(rows, bins):
    actual = result(rows, bins=bins)
    assert 1 <= len(actual.bins) <= bins
    assert sum(b.tokens for b in actual.bins) == actual.tokens == sum(map(len, rows))
    assert len({b.end - b.start for b in actual.bins}) == 1
    assert [b.start for b in actual.bins[1:]] == [b.end for b in actual.bins[:-1]]
    for name in ("kl", "agreement"):
        total = math.fsum(b.tokens * getattr(b, name) for b in actual.bins)
        assert total / actual.tokens == pytest.approx(getattr(actual, name))
