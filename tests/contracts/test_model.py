"""llm-compressor and compressed-tensors around a model: names, weights, schemes, saving."""

import torch

from tests.tiny import tiny_model


def test_seam_match_named_modules_takes_names_classes_and_patterns():
    from compressed_tensors.utils import match_named_modules

    model = tiny_model()
    assert len(list(match_named_modules(model, ["Linear"]))) == 15
    assert [n for n, _ in match_named_modules(model, ["lm_head"])] == ["lm_head"]
    some = [n for n, _ in match_named_modules(model, ["re:.*q_proj$"], ["re:.*layers.0.*"])]
    assert some == ["model.layers.1.self_attn.q_proj"]


def test_seam_quantization_modifier_attaches_schemes_without_being_run():
    """What llmcompressor/quantizer.py uses of it, and what it leaves on a module."""
    from compressed_tensors.quantization import QuantizationStatus
    from llmcompressor.modifiers.quantization import QuantizationModifier

    model = tiny_model()
    upstream = QuantizationModifier(scheme="W8A8", ignore=["lm_head"])
    upstream.initialize_quantization(model)
    module = model.model.layers[0].mlp.up_proj
    assert module.weight_scale.shape == (128, 1)
    assert module.weight_zero_point.shape == (128, 1)
    assert not module.quantization_enabled
    assert not hasattr(model.lm_head, "quantization_scheme")
    upstream.end_calibration(model)
    assert module.quantization_enabled
    assert module.quantization_status == QuantizationStatus.FROZEN < QuantizationStatus.COMPRESSED


def test_seam_a_compressor_takes_a_wider_weight_than_the_modules():
    """Weights are widened to float32 before they are divided by their scales."""
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.quantization import preset_name_to_scheme

    scheme = preset_name_to_scheme("W8A8", ["Linear"])
    name = infer_module_format(torch.nn.Linear, scheme).value
    assert name == "int-quantized"
    codes = torch.tensor([[127.0, -127.0, 65.0, 0.0]])
    scale = torch.tensor([[1.0546875]], dtype=torch.bfloat16)
    state = {
        "weight": (codes * scale.float()).bfloat16(),
        "weight_scale": scale,
        "weight_zero_point": torch.zeros(1, 1),
    }
    compress = BaseCompressor.get_value_from_registry(name).compress
    exact = compress({**state, "weight": state["weight"].float()}, scheme)["weight"]
    assert torch.equal(exact.float(), codes)
    assert "weight_zero_point" not in compress(state, scheme)


def test_seam_modify_save_pretrained_leaves_a_marked_one_alone():
    from llmcompressor.transformers.compression.compressed_tensors_utils import (
        modify_save_pretrained,
    )

    model = tiny_model()
    modify_save_pretrained(model)
    assert model.save_pretrained._overridden is True
    marked = model.save_pretrained
    modify_save_pretrained(model)
    assert model.save_pretrained is marked
