"""Small inputs count as zero at generated tokens, and at no other."""

import pytest
import torch

from rac_modifier.measure.divergence import DenseReference
from rac_modifier.measure.skipped_inputs import SkippedInputs, generated_tokens
from tests.tiny import tiny_model

NAMES = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj")
THRESHOLDS = {name: torch.linspace(0.0, 2.0, 64) for name in NAMES}


def reads(model):
    """What each of the modules multiplies, by name: a list that forward passes append to."""
    seen = {name: [] for name in NAMES}
    for name, values in seen.items():
        module = model.get_submodule(name)
        module.register_forward_hook(lambda m, args, out, values=values: values.append(args[0][0]))
    return seen


def expected(dense, generated):
    small = dense.abs() < torch.linspace(0.0, 2.0, 64)
    return dense.masked_fill(small & generated[:, None], 0.0)


def test_generated_tokens_are_masked_and_prompts_are_not():
    ids, generated = torch.randint(3, 300, (1, 12)), torch.arange(12) >= 5
    first = NAMES[0]
    for mask in (generated, torch.zeros(12, dtype=torch.bool)):
        dense, sparse = tiny_model(), tiny_model()
        SkippedInputs(sparse, {first: THRESHOLDS[first]})
        plain, skipped = reads(dense), reads(sparse)
        with (
            torch.no_grad(),
            generated_tokens(dense, mask[None]),
            generated_tokens(sparse, mask[None]),
        ):
            outputs = [model(input_ids=ids).logits for model in (dense, sparse)]
        torch.testing.assert_close(skipped[first][0], expected(plain[first][0], mask))
        assert torch.equal(*outputs) == (not mask.any())


@torch.no_grad()
def test_decoding_gives_what_teacher_forcing_measures():
    model, prompt = tiny_model(), torch.randint(3, 300, (1, 6))
    SkippedInputs(model, THRESHOLDS)
    out = model.generate(prompt, max_new_tokens=10, do_sample=False, output_logits=True,
                         return_dict_in_generate=True)  # fmt: skip
    ids = out.sequences
    with generated_tokens(model, (torch.arange(ids.shape[1]) >= 6)[None]):
        logits = model(input_ids=ids).logits[0, 5:-1]
    torch.testing.assert_close(torch.cat(out.logits), logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits, model(input_ids=ids).logits[0, 5:-1], atol=1e-2)


def test_the_divergence_is_of_the_model_that_skips(monkeypatch):
    model, other = tiny_model(), tiny_model()
    texts = [(torch.randint(3, 300, (n,)).tolist(), n // 3) for n in (9, 20, 31)]
    reference = DenseReference(model, texts)
    assert reference.divergence(other, label="same").kl == pytest.approx(0, abs=1e-6)
    SkippedInputs(other, THRESHOLDS)
    whole = reference.divergence(other, label="skips").kl
    assert whole > 1e-3
    monkeypatch.setattr("rac_modifier.measure.divergence.WINDOW_ELEMENTS", 7 * 2 * 3 * 300)
    assert reference.divergence(other, label="in windows").kl == pytest.approx(whole, rel=1e-4)
    kl = []
    with torch.no_grad():
        for ids, start in texts:
            row = torch.tensor([ids[:-1]])
            with generated_tokens(other, (torch.arange(len(ids) - 1) >= start)[None]):
                log_q = other(input_ids=row).logits[0, start - 1 :].double().log_softmax(-1)
            log_p = model(input_ids=row).logits[0, start - 1 :].double().log_softmax(-1)
            kl += (log_p.exp() * (log_p - log_q)).sum(-1).tolist()
    assert whole == pytest.approx(sum(kl) / len(kl), rel=1e-4)
