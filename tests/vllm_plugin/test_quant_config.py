"""The config: whose checkpoints, which layers, and what vLLM runs."""

from __future__ import annotations

import pytest
import torch

from tests.vllm_plugin.vllm_fixtures import needs_vllm, on_rank

needs_vllm()

from vllm.model_executor.layers import linear  # noqa: E402
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig  # noqa: E402

from rac_modifier.checkpoint.formats import pack  # noqa: E402
from rac_modifier.checkpoint.sparsity_config import with_packed  # noqa: E402
from rac_modifier.errors import RacError  # noqa: E402
from rac_modifier.kernels.choose import BACKENDS  # noqa: E402
from rac_modifier.vllm_plugin import METHOD  # noqa: E402
from rac_modifier.vllm_plugin.quant_config import RacSparseConfig  # noqa: E402
from tests.vllm_plugin.layer_kinds import make  # noqa: E402

PACKED = with_packed({}, "sparse-bitmask", {"model.a": "unstructured"}, 0.5, ["lm_head"])[
    "quantization_config"
]


def test_the_config_fulfils_the_abstract_class():
    config = RacSparseConfig.from_config(PACKED)
    assert isinstance(config, QuantizationConfig)
    assert config.get_name() == METHOD
    assert torch.float32 in config.get_supported_act_dtypes()
    assert config.get_min_capability() == 0


def test_quantization_of_another_kind_on_request_is_an_error():
    with pytest.raises(RacError, match="quantized by 'fp8', and not packed sparse"):
        RacSparseConfig.from_config({"quant_method": "fp8"})


def test_apply_vllm_mapper_renames_modules():
    from vllm.model_executor.models.utils import WeightsMapper

    config = RacSparseConfig.from_config(
        with_packed({}, "sparse-bitmask", {}, 0.5, ["model.v.a", "x.b"])["quantization_config"]
    )
    config.apply_vllm_mapper(
        WeightsMapper(orig_to_new_prefix={"model.": "language_model."}).get_rename_mapper()
    )
    assert config.layers is not None
    assert config.layers.ignore == ("language_model.v.a", "x.b")
    assert config.layers.targets == ("Linear",)


def test_embeddings_and_heads_stay_with_vllm(monkeypatch):
    on_rank(monkeypatch, 0, 1)
    assert (
        RacSparseConfig.from_config(PACKED).get_quant_method(torch.nn.Linear(2, 2), "lm_head")
        is None
    )


def test_sparse_over_quantized_builds_on_compressed_tensors(monkeypatch):
    """Without a backend for the device, vLLM's own method runs it dense; its config does not get the sparsity_config."""
    monkeypatch.delitem(BACKENDS, "cpu")
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
        CompressedTensorsLinearMethod,
    )

    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    inputs = {**weights, "strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    config = RacSparseConfig.from_config(
        {
            **PACKED,
            "format": "int-quantized",
            "config_groups": {"group_0": group},
            "ignore": ["lm_head"],
        }
    )
    on_rank(monkeypatch, 0, 1)
    layer = linear.ColumnParallelLinear(
        32, 16, bias=False, quant_config=config, prefix="model.a", params_dtype=torch.bfloat16
    )
    assert isinstance(layer.quant_method.inner, CompressedTensorsLinearMethod)
    assert {"weight_scale", "compressed", "bitmask", "row_offsets", "shape"} <= dict(
        layer.named_parameters()
    ).keys()
    loaded = {"weight_scale": torch.rand(16, 1)}
    weight = torch.randint(-128, 128, (16, 32), dtype=torch.int8)
    weight[torch.rand(16, 32) < 0.5] = 0
    for name, tensor in {**loaded, **pack(weight, "sparse-bitmask", "model.a")}.items():
        parameter = getattr(layer, name)
        parameter.weight_loader(parameter, tensor)
    given = {}
    monkeypatch.setattr(
        layer.quant_method.inner,
        "process_weights_after_loading",
        lambda layer: given.update(
            weight=layer.weight.data.clone(), scale=layer.weight_scale.data.clone()
        ),
    )
    layer.quant_method.process_weights_after_loading(layer)
    assert torch.equal(given["weight"], weight)
    assert torch.equal(given["scale"], loaded["weight_scale"].to(given["scale"].dtype))
    assert "there is no sparse kernel for" in config.summary.decisions["model.a"].reason


def test_fused_layers_are_quantized_as_their_parts_are(monkeypatch):
    """vLLM's config is asked for `a.qkv`, and the checkpoint names `a.q`, `a.k` and `a.v`."""
    monkeypatch.delitem(BACKENDS, "cpu")
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    group = {
        "targets": ["re:.*a[.][qkv]$"],
        "weights": weights,
        "input_activations": {**weights, "strategy": "token", "dynamic": True},
    }
    config = RacSparseConfig.from_config(
        {
            **PACKED,
            "format": "int-quantized",
            "config_groups": {"group_0": group},
            "ignore": ["lm_head"],
        }
    )
    on_rank(monkeypatch, 0, 1)
    assert make("qkv", config).quant_method.as_quantized
    assert not make("column", config).quant_method.as_quantized  # no target
