"""What a run records about its divergence, with the dense model's head inputs kept."""

import copy
from types import SimpleNamespace

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from rac_modifier.errors import RacError
from rac_modifier.evaluation import run_divergence
from rac_modifier.evaluation.divergence import divergence
from rac_modifier.evaluation.run_divergence import DenseReference, RunDivergence
from rac_modifier.traces.records import Trace
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
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "head_dim": 16}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    caps = {"final_logit_softcapping": 3.0, "initializer_range": 0.4}
    return Gemma2ForCausalLM(Gemma2Config(**sizes, **heads, **caps)).eval()


@pytest.mark.parametrize("make", [tiny_model, softcapped])
@pytest.mark.parametrize("elements", [None, 4000])
def test_the_same_as_with_both_models_at_hand(make, elements, monkeypatch):
    """Also with logits capped behind the head, and computed window by window."""
    dense = make()
    pruned = shaken(dense)
    expected = divergence(dense, pruned, sequences(), label="x", bins=8, progress=False)
    if elements:
        monkeypatch.setattr(run_divergence, "WINDOW_ELEMENTS", elements)
    monkeypatch.setattr(run_divergence, "BATCH_TOKENS", 160)
    result = DenseReference(dense.train(), sequences()).divergence(pruned.train(), label="x")
    assert result.tokens == expected.tokens
    assert result.kl == pytest.approx(expected.kl, rel=1e-3)
    assert result.kl > 1e-3
    assert result.agreement == expected.agreement
    assert [b.kl for b in result.bins] == pytest.approx([b.kl for b in expected.bins], rel=2e-3)
    assert dense.training
    assert pruned.training
    assert not pruned.get_output_embeddings()._forward_pre_hooks


def test_the_logits_in_memory_are_bounded_and_the_bound_is_used(monkeypatch):
    """Both models' logits count: 20 positions of a sequence and 300 tokens, twice."""
    model, sizes = tiny_model(), []
    monkeypatch.setattr(run_divergence, "WINDOW_ELEMENTS", 2 * 20 * 300)
    monkeypatch.setattr(run_divergence, "BATCH_TOKENS", 1)
    reference = DenseReference(model, sequences())
    model.lm_head.register_forward_hook(lambda module, args, output: sizes.append(output.numel()))
    assert reference.divergence(model, label="x").kl == pytest.approx(0.0, abs=1e-6)
    assert max(sizes) == 2 * 20 * 300


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (lambda: None, "Qwen3ForCausalLM has no output embeddings"),
        (lambda: torch.nn.Linear(64, 300), "does not call its output embeddings"),
    ],
)
def test_a_model_without_a_usable_head_is_refused(head, message):
    model = tiny_model()
    model.get_output_embeddings = head
    with pytest.raises(RacError, match=message):
        DenseReference(model, sequences())


def held_out(count: int = 4) -> SimpleNamespace:
    """As much of a calibration set as is read here."""
    traces = [
        Trace(f"{i}#0", str(i), tuple(ids[:prompt]), tuple(ids[prompt:]), "stop", 0, "?", None)
        for i, (ids, prompt) in enumerate(sequences())
    ]
    return SimpleNamespace(held_out=tuple(traces[:count]))


def test_a_run_records_its_divergence_on_the_held_out_traces():
    dense = tiny_model()
    pruned = shaken(dense)
    expected = divergence(dense, pruned, sequences(), label="x", bins=8, progress=False)
    record = RunDivergence(dense, held_out(), off_policy=False).measure(pruned)
    assert record["kl"] == pytest.approx(expected.kl, rel=1e-3)
    assert (record["sequences"], record["tokens"]) == (4, expected.tokens)
    assert len(record["bins"]) == 8
    assert "label" not in record


def test_a_run_that_measures_nothing_says_why_and_goes_on():
    def reason(calibration, model, off_policy=False, change=lambda model: None):
        run = RunDivergence(model, calibration, off_policy=off_policy)
        change(model)
        record = run.measure(model)
        assert record.keys() == {"not_measured"}
        return record["not_measured"]

    assert "no traces were held out" in reason(held_out(0), tiny_model())
    assert "may be another model's" in reason(held_out(), tiny_model(), off_policy=True)
    headless = tiny_model()
    headless.get_output_embeddings = lambda: None
    assert "no output embeddings" in reason(held_out(), headless)
    changed = reason(held_out(), tiny_model(), change=lambda m: m.lm_head.weight.data.mul_(1.01))
    assert "the output head was changed too" in changed
