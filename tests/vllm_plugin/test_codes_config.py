"""What the configs of GPTQ and AWQ checkpoints share: heads, the check of the folder, the names of what is in floats."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from tests.vllm_plugin.vllm_fixtures import needs_vllm, on_rank

needs_vllm()

from vllm.model_executor.layers import linear  # noqa: E402
from vllm.model_executor.layers.quantization.auto_gptq import AutoGPTQConfig, AutoGPTQLinearMethod  # noqa: E402
from vllm.model_executor.layers.vocab_parallel_embedding import (  # noqa: E402
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)

from rac_modifier.errors import RacError  # noqa: E402
from rac_modifier.vllm_plugin import codes_config  # noqa: E402
from rac_modifier.vllm_plugin.gptq_awq_linear import GptqAwqLinearMethod  # noqa: E402
from rac_modifier.vllm_plugin.head import RoundedMethod  # noqa: E402
from rac_modifier.vllm_plugin.quant_config import RacSparseConfig  # noqa: E402
from tests.vllm_plugin.gptq_awq import awq_config, config_of, gptq_config  # noqa: E402
from tests.vllm_plugin.layer_kinds import make  # noqa: E402
from tests.vllm_plugin.test_dense_config import head  # noqa: E402


def config_with(form: str = "gptq", **changes):
    return RacSparseConfig.from_config(config_of(form, 32, form == "gptq", **changes))


@pytest.mark.parametrize("form", ["gptq", "awq"])
def test_a_head_in_floats(monkeypatch, form):
    """vLLM's, or rounded on request."""
    assert config_with(form).get_quant_method(head(), "lm_head") is None
    monkeypatch.setenv("RAC_LM_HEAD", "int8")
    assert isinstance(config_with(form).get_quant_method(head(), "lm_head"), RoundedMethod)


def test_a_quantized_head_is_vllms_with_the_reason(monkeypatch):
    monkeypatch.setattr(
        AutoGPTQLinearMethod, "process_weights_after_loading", lambda self, layer: None
    )
    config = config_with(lm_head=True)
    method = config.get_quant_method(head(), "lm_head")
    assert type(method) is AutoGPTQLinearMethod
    layer = head()
    layer.g_idx = None  # which create_weights makes
    method.process_weights_after_loading(layer)
    reason = "vLLM's own method because heads of this format have no kernel"
    assert {name: each.reason for name, each in config.summary.decisions.items()} == {
        "lm_head": reason
    }
    embedding = VocabParallelEmbedding.__new__(VocabParallelEmbedding)
    torch.nn.Module.__init__(embedding)
    assert config.get_quant_method(embedding, "model.embed_tokens") is None
    monkeypatch.setenv("RAC_LM_HEAD", "int4")
    with pytest.raises(
        RacError, match="RAC_LM_HEAD=int4: the checkpoint has a quantized head already; unset"
    ):
        config.get_quant_method(head(), "lm_head")


def test_a_head_that_rules_leave_in_floats(monkeypatch):
    config = config_with(lm_head=True, dynamic={"-:lm_head": {}})
    assert isinstance(
        AutoGPTQConfig.get_quant_method(config, head(), "lm_head"), UnquantizedEmbeddingMethod
    )
    assert config.get_quant_method(head(), "lm_head") is None
    monkeypatch.setenv("RAC_LM_HEAD", "int8")
    assert isinstance(config.get_quant_method(head(), "lm_head"), RoundedMethod)


def test_a_quantized_head_that_vllm_refuses():
    config = RacSparseConfig.from_config(gptq_config(symmetric=False, lm_head=True))
    with pytest.raises(
        RacError,
        match=r"^lm_head: .* heads of this format have no kernel, and vLLM does not either .*sym=False",
    ):
        config.get_quant_method(head(), "lm_head")


def test_other_layers_are_vllms():
    assert config_with().get_quant_method(torch.nn.Embedding(4, 4), "model.x") is None


@pytest.mark.parametrize("form", ["gptq", "awq"])
def test_what_is_in_floats_is_read_from_the_files(monkeypatch, tmp_path, form):
    """`maybe_update_config` of vLLM does; a missing file is refused before."""
    on_rank(monkeypatch, 0, 1)
    monkeypatch.setattr(
        codes_config,
        "crossovers",
        lambda kinds, eight_bits: {"int4": 7.0} if kinds == ("int4",) else {},
    )
    config = config_with(form)
    words = torch.zeros(2, 2, dtype=torch.int32)
    save_file(
        {"a.row.weight": torch.zeros(2, 2), "a.column.qweight": words},
        tmp_path / "model.safetensors",
    )
    config.maybe_update_config(str(tmp_path))
    assert config.crossovers == {"int4": 7.0}
    assert type(make("row", config).quant_method) is linear.UnquantizedLinearMethod
    assert type(make("column", config).quant_method) is GptqAwqLinearMethod
    index = {"weight_map": {"a": "model-1.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(RacError, match=r"model-1\.safetensors"):
        config_with(form).maybe_update_config(str(tmp_path))


def test_activations_of_8_bits_on_request(monkeypatch):
    on_rank(monkeypatch, 0, 1)
    assert make("row", config_with()).quant_method.activation_bits == 16
    monkeypatch.setenv("RAC_ACTIVATIONS", "int8")
    assert make("row", RacSparseConfig.from_config(awq_config())).quant_method.activation_bits == 8
