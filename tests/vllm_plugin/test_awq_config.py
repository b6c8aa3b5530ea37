"""The config of AWQ checkpoints: which layers get the kernel, and what vLLM runs."""

from __future__ import annotations

import pytest

from tests.vllm_plugin.vllm_fixtures import needs_vllm, on_rank

needs_vllm()

from vllm.model_executor.layers import linear  # noqa: E402
from vllm.model_executor.layers.quantization.auto_awq import (  # noqa: E402
    AutoAWQConfig,
    AutoAWQMarlinLinearMethod,
)

from rac_modifier.errors import RacError  # noqa: E402
from rac_modifier.vllm_plugin import METHOD  # noqa: E402
from rac_modifier.vllm_plugin.awq_config import AwqCodesConfig  # noqa: E402
from rac_modifier.vllm_plugin.gptq_awq_linear import GptqAwqLinearMethod  # noqa: E402
from rac_modifier.vllm_plugin.quant_config import RacSparseConfig  # noqa: E402
from tests.vllm_plugin.gptq_awq import awq_config  # noqa: E402
from tests.vllm_plugin.layer_kinds import make  # noqa: E402


def test_on_request_only():
    config = awq_config()
    assert RacSparseConfig.override_quantization_method(config, None) is None
    assert RacSparseConfig.override_quantization_method(config, "awq") is None
    assert RacSparseConfig.override_quantization_method(config, METHOD) == METHOD
    made = RacSparseConfig.from_config(config)
    assert type(made) is AwqCodesConfig
    assert isinstance(made, AutoAWQConfig)  # some models of vLLM ask


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"bits": 8},
            "no effect on this checkpoint, since its weights are int8, not int4; leave it out",
        ),
        ({"bits": None}, "quantization_config.bits is None, but must be a whole number; restore"),
        ({"group_size": 0}, "quantization_config.group_size is 0, but must be a number of columns"),
        (
            {"zero_point": "yes"},
            "quantization_config.zero_point is 'yes', but must be true or false",
        ),
        (
            {"version": "gemv"},
            "the words of this AWQ checkpoint are in version gemv, and those of gemm are read here; leave out",
        ),
        ({"version": "gemv_fast"}, "in version gemv_fast"),
        ({"backend": "llm-awq"}, "in version of llm-awq"),
        ({"version": 1}, "quantization_config.version is 1, but must be a text"),
    ],
)
def test_a_config_that_is_refused(changes, message):
    with pytest.raises(RacError, match=message):
        RacSparseConfig.from_config({**awq_config(), **changes})


def test_the_names_that_other_writers_use():
    config = {"quant_method": "awq", "w_bit": 4, "q_group_size": 128, "zero_point": True}
    made = RacSparseConfig.from_config(config)
    assert (made.weight_bits, made.group_size) == (4, 128)
    assert type(RacSparseConfig.from_config(awq_config(version="GEMM"))) is AwqCodesConfig
    with pytest.raises(RacError, match="quantization_config has no w_bit or bits; restore"):
        RacSparseConfig.from_config({"quant_method": "awq"})


@pytest.mark.parametrize("within", ["", "draft_model."])
def test_the_method_of_each_layer(monkeypatch, within):
    on_rank(monkeypatch, 0, 1)
    config = RacSparseConfig.from_config(
        awq_config(group=None, modules_to_not_convert=["row", "gate", "up"])
    )
    method = {
        kind: make(kind, config, within=within).quant_method
        for kind in ("column", "row", "qkv", "merged")
    }
    assert {kind: type(each) for kind, each in method.items()} == {
        "column": GptqAwqLinearMethod,
        "row": linear.UnquantizedLinearMethod,
        "qkv": GptqAwqLinearMethod,
        "merged": linear.UnquantizedLinearMethod,
    }
    shards = method["qkv"].shards
    assert (shards.bits, shards.group, shards.symmetric, shards.modules) == (
        4,
        None,
        False,
        ["a.q", "a.k", "a.v"],
    )
    assert isinstance(method["qkv"].inner, AutoAWQMarlinLinearMethod)
    assert (config.summary.expected, config.summary.kernel) == (2, "an int4 kernel")


def test_parts_of_a_fused_layer_that_differ(monkeypatch):
    on_rank(monkeypatch, 0, 1)
    config = RacSparseConfig.from_config(awq_config(modules_to_not_convert=["a.k"]))
    with pytest.raises(
        RacError,
        match=r"^a\.qkv: .*\(a\.q: int4 with groups of 32, asymmetric, a\.k: floats, a\.v: int4",
    ):
        make("qkv", config)
