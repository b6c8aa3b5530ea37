import torch

from rac_modifier.quantization.grid import Grid
from rac_modifier.recovery.on_grid import QuantizedWeight
from rac_modifier.recovery.trained_parameters import in_float32, trained_name
from tests.recovery.recovery_helpers import dense_and_sparse


def test_all_but_embeddings_and_head_are_trained_in_float32_and_come_back():
    _, model = dense_and_sparse()
    model.to(torch.bfloat16)
    model.model.norm.weight.requires_grad_(False)
    rotary = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with in_float32(model):
        for name, parameter in model.named_parameters():
            frozen = "embed" in name or "lm_head" in name
            assert parameter.requires_grad != frozen, name
            assert parameter.dtype == (torch.bfloat16 if frozen else torch.float32), name
        model.model.norm.weight.grad = torch.ones(64)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not model.model.norm.weight.requires_grad
    assert model.model.layers[0].mlp.up_proj.weight.requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(buffer, rotary[name]) for name, buffer in model.named_buffers())


def test_a_tied_embedding_is_frozen_with_its_head():
    from tests.tiny import tiny_model

    model = tiny_model(tie_word_embeddings=True)
    with in_float32(model):
        assert not model.get_input_embeddings().weight.requires_grad


def test_scales_are_not_trained_as_they_are():
    _, model = dense_and_sparse()
    linear = model.model.layers[0].mlp.up_proj
    linear.register_parameter(
        "weight_scale", torch.nn.Parameter(torch.ones(128, 1), requires_grad=False)
    )
    with in_float32(model):
        assert not linear.weight_scale.requires_grad


def test_the_name_of_a_quantized_weight_is_that_of_its_master():
    quantized = {"a.b": QuantizedWeight(Grid("int", 4, 32), torch.ones(1, 1))}
    assert trained_name("a.b.weight", quantized) == "a.b.parametrizations.weight.original"
    assert trained_name("a.b.bias", quantized) == "a.b.bias"
    assert trained_name("a.c.weight", quantized) == "a.c.weight"
