"""A mixture of experts has one fingerprint, whether its experts are merged or cut into linear layers."""

import pytest
import torch
from llmcompressor.modeling.moe.linearize import linearize_moe
from transformers import AutoModelForCausalLM

from rac_modifier.sampling.merged_experts import MergedExperts
from rac_modifier.sampling.model_identity import model_fingerprint
from tests.tiny import save_tiny_experts


@pytest.mark.parametrize("stride", [1, 3, 7, 101])
def test_the_numbers_are_those_of_the_merged_tensor(stride):
    gate, up = torch.randn(3, 4, 5), torch.randn(3, 2, 5)
    made = torch.cat([gate, up], dim=1)
    merged = MergedExperts([[g, u] for g, u in zip(gate, up, strict=True)])
    assert merged.shape == made.shape
    assert merged.numel() == made.numel()
    assert torch.equal(merged.every(stride), made.flatten()[::stride])


@pytest.mark.parametrize("kind", ["qwen3", "mixtral", "qwen2"])
def test_cutting_the_experts_apart_leaves_the_fingerprint(kind, tmp_path):
    folder = save_tiny_experts(tmp_path, kind)
    before = model_fingerprint(AutoModelForCausalLM.from_pretrained(folder))
    model = linearize_moe(AutoModelForCausalLM.from_pretrained(folder))
    assert model_fingerprint(model) == before
    with torch.no_grad():
        model.model.layers[1].mlp.experts[3].down_proj.weight.mul_(1.5)
    assert model_fingerprint(model) != before


def test_other_experts_are_read_as_they_are(tmp_path):
    model = linearize_moe(AutoModelForCausalLM.from_pretrained(save_tiny_experts(tmp_path)))
    before = model_fingerprint(model)
    type(model.model.layers[0].mlp.experts).has_bias = True
    try:
        assert model_fingerprint(model) != before
    finally:
        type(model.model.layers[0].mlp.experts).has_bias = False
