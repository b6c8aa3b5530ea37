"""The cost of a rounded head, against a second model whose head has the rounded weights."""

import copy
import re

import pytest
import torch

from rac_modifier.checkpoint.round_to_nearest import round_head
from rac_modifier.checkpoint.stored_weight import dequantize
from rac_modifier.errors import RacError
from rac_modifier.evaluation.divergence import divergence
from rac_modifier.evaluation.rounded_head import measure_rounded_head, rounded_head_table
from tests.evaluation.test_dense_reference import sequences, softcapped
from tests.tiny import tiny_model


def with_rounded_head(model, bits):
    other = copy.deepcopy(model)
    head = other.get_output_embeddings()
    weight = head.weight.detach()
    head.weight = torch.nn.Parameter(dequantize(*round_head(weight, bits), torch.float32))
    return other


def tied():
    return tiny_model(tie_word_embeddings=True)


def biased():
    model = tiny_model()
    model.lm_head.bias = torch.nn.Parameter(torch.randn(300))
    return model


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("make", [tiny_model, tied, biased, softcapped])
@pytest.mark.parametrize("elements", [1 << 26, 3000])
def test_the_same_as_of_a_model_with_that_head(make, bits, elements):
    """Also where the logits are capped behind the head, and window by window; a tied embedding is not rounded."""
    model = make()
    expected = divergence(
        model, with_rounded_head(model, bits), sequences(), label="x", bins=8, progress=False
    )
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = measure_rounded_head(model, sequences(), bits, window_elements=elements, progress=False)
    assert found.divergence.tokens == expected.tokens
    assert found.divergence.kl == pytest.approx(expected.kl, rel=2e-2, abs=1e-8)
    assert found.divergence.kl > 1e-8
    assert found.divergence.agreement == expected.agreement
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not model.get_output_embeddings()._forward_hooks


def test_the_products_of_a_bfloat16_model_are_not_rounded():
    """In bfloat16 logits that noise would hide what int8 costs."""
    model = tiny_model()
    exact = measure_rounded_head(model, sequences(), 8, progress=False).divergence.kl
    found = measure_rounded_head(model.bfloat16(), sequences(), 8, progress=False).divergence.kl
    assert found == pytest.approx(exact, rel=0.5)


def test_bytes_and_table():
    model = tiny_model()
    both = [measure_rounded_head(model, sequences(), bits, progress=False) for bits in (8, 4)]
    assert [each.nbytes for each in both] == [300 * 64 + 300 * 4, 300 * 32 + 300 * 2]
    assert {each.unrounded_bytes for each in both} == {300 * 64 * 4}
    assert both[1].divergence.kl > 10 * both[0].divergence.kl
    assert both[1].weight_error > 10 * both[0].weight_error
    table = rounded_head_table(both)
    assert [row[0] for row in table.rows] == ["int8", "int4"]
    assert re.fullmatch(r"\d\.\de-\d\d ± \d\.\de-\d\d", table.rows[1][3])
    assert "[300, 64]" in table.note
    assert both[0].as_dict()["divergence"]["kl"] == both[0].divergence.kl


def test_what_is_refused():
    model = tiny_model()
    with pytest.raises(RacError, match="bits=2: a head can be rounded to 8 or 4 bits"):
        measure_rounded_head(model, sequences(), 2)
    with pytest.raises(RacError, match="no sequences"):
        measure_rounded_head(model, [], 8)
    model.lm_head.quantization_scheme = "W8A16"
    with pytest.raises(RacError, match="quantized already"):
        measure_rounded_head(model, sequences(), 8)
