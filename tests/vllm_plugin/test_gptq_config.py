"""The config of GPTQ checkpoints: which layers get the kernel, and what vLLM runs or refuses."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.vllm_plugin.vllm_fixtures import needs_vllm, on_rank

needs_vllm()

from vllm.model_executor.layers import linear  # noqa: E402
from vllm.model_executor.layers.fused_moe import RoutedExperts  # noqa: E402
from vllm.model_executor.layers.quantization import auto_gptq  # noqa: E402
from vllm.model_executor.layers.quantization.auto_gptq import AutoGPTQConfig, AutoGPTQLinearMethod  # noqa: E402

from rac_modifier.errors import RacError  # noqa: E402
from rac_modifier.vllm_plugin import METHOD  # noqa: E402
from rac_modifier.vllm_plugin.codes_config import Scheme  # noqa: E402
from rac_modifier.vllm_plugin.gptq_awq_linear import GptqAwqLinearMethod, RefusedByVllm  # noqa: E402
from rac_modifier.vllm_plugin.gptq_config import GptqCodesConfig  # noqa: E402
from rac_modifier.vllm_plugin.quant_config import RacSparseConfig  # noqa: E402
from tests.vllm_plugin.gptq_awq import gptq_config  # noqa: E402
from tests.vllm_plugin.layer_kinds import make  # noqa: E402


def made(**changes):
    return RacSparseConfig.from_config(gptq_config(**changes))


def test_on_request_only():
    config = gptq_config()
    before = copy.deepcopy(config)
    assert RacSparseConfig.override_quantization_method(config, None) is None
    assert RacSparseConfig.override_quantization_method(config, "gptq") is None
    assert RacSparseConfig.override_quantization_method(config, METHOD) == METHOD
    assert (
        AutoGPTQConfig.override_quantization_method(config, METHOD) is None
    )  # vLLM's own would come first
    assert type(RacSparseConfig.from_config(config)) is GptqCodesConfig
    assert isinstance(
        RacSparseConfig.from_config(config), AutoGPTQConfig
    )  # some models of vLLM ask
    assert config == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"bits": 8},
            "no effect on this checkpoint, since its weights are int8, not int4, int3 or int2; leave it out",
        ),
        ({"bits": 5}, "quantization_config.bits is 5; GPTQ has weights of 2, 3, 4 or 8 bits"),
        ({"bits": "4"}, "quantization_config.bits is '4', but must be a whole number; restore"),
        ({"bits": True}, "quantization_config.bits is True, but must be a whole number"),
        (
            {"group_size": 0},
            "quantization_config.group_size is 0, but must be a number of columns, or -1 for one",
        ),
        ({"group_size": -128}, "quantization_config.group_size is -128"),
        ({"sym": 1}, "quantization_config.sym is 1, but must be true or false"),
        ({"dynamic": ["a"]}, "quantization_config.dynamic is .*, but must be a table"),
        ({"dynamic": {"a": 8}}, "quantization_config.dynamic.a is 8, but must be a table"),
        ({"dynamic": {"a": {"bits": 16}}}, "quantization_config.bits is 16; GPTQ has"),
        ({"dynamic": {"a": {"group_size": 0}}}, "quantization_config.dynamic.a.group_size is 0"),
        ({"dynamic": {"a": {"sym": "no"}}}, "quantization_config.sym is 'no'"),
        (
            {"checkpoint_format": "marlin"},
            "the words of this checkpoint are in the format marlin, and those of gptq and gptq_v2",
        ),
        (
            {"is_marlin_format": True},
            "in the format marlin, .*leave out --quantization rac, or take a checkpoint",
        ),
        (
            {"checkpoint_format": 2},
            "quantization_config.checkpoint_format is 2, but must be a text",
        ),
    ],
)
def test_a_config_that_is_refused(changes, message):
    with pytest.raises(RacError, match=message):
        RacSparseConfig.from_config({**gptq_config(), **changes})


@pytest.mark.parametrize("name", ["bits", "group_size", "sym"])
def test_an_entry_that_is_missing(name):
    config = gptq_config()
    del config[name]
    with pytest.raises(
        RacError, match=rf"quantization_config has no {name}; restore the config\.json"
    ):
        RacSparseConfig.from_config(config)


def test_what_old_writers_leave_out():
    """AutoGPTQ wrote no format, which is the first, and null for rules."""
    config = gptq_config(dynamic=None)
    del config["checkpoint_format"], config["desc_act"]
    assert RacSparseConfig.from_config(config).format == "gptq"


DYNAMIC = {
    r"-:.*\.column": {},
    r"+:.*\.row": {"bits": 3, "group_size": 96, "sym": False},
    r".*\.(q|k|v)$": {"bits": 2, "group_size": -1},
    r"+:.*\.(gate|up)$": {"bits": 8},
}


@pytest.mark.parametrize("within", ["", "draft_model."])
def test_the_method_of_each_layer(monkeypatch, within):
    """Rules of GPTQModel by the names on disk: floats stay with vLLM, int8 with a reason, the others get the kernel."""
    on_rank(monkeypatch, 0, 1)
    config = made(dynamic=DYNAMIC)
    method = {
        kind: make(kind, config, within=within).quant_method
        for kind in ("column", "row", "qkv", "replicated")
    }
    with pytest.raises(
        RacError, match=r"^a\.gate_up: no kernel .* its weights are int8, and vLLM does not either"
    ):
        make("merged", config, within=within)  # on a CPU
    assert type(method["column"]) is linear.UnquantizedLinearMethod
    assert {type(method[kind]) for kind in ("row", "qkv", "replicated")} == {GptqAwqLinearMethod}
    shards = {kind: method[kind].shards for kind in ("row", "qkv", "replicated")}
    found = {
        kind: (each.bits, each.group, each.symmetric, each.modules) for kind, each in shards.items()
    }
    assert found == {
        "row": (3, 96, False, ["a.row"]),
        "qkv": (2, None, True, ["a.q", "a.k", "a.v"]),
        "replicated": (4, 32, True, ["a.replicated"]),
    }
    assert (config.summary.expected, config.summary.kernel) == (4, "an int4 or int3 or int2 kernel")


def test_int8_layers_that_vllm_runs_are_in_the_summary(monkeypatch):
    on_rank(monkeypatch, 0, 1)
    for name in ("create_weights", "process_weights_after_loading"):
        monkeypatch.setattr(AutoGPTQLinearMethod, name, lambda self, *sizes, **attributes: None)
    monkeypatch.setattr(auto_gptq, "verify_marlin_supported", lambda **arguments: None)
    config = made(dynamic={r".*\.row": {"bits": 8}})
    layer = make("row", config)
    assert type(layer.quant_method) is AutoGPTQLinearMethod
    assert layer.quant_method.quant_config.weight_bits == 8
    layer.quant_method.process_weights_after_loading(layer)
    assert (
        config.summary.decisions["a.row"].reason == "vLLM's own method because its weights are int8"
    )


@pytest.mark.parametrize(
    ("rules", "kinds"),
    [
        ({r"-:.*\.k$": {}}, r"a\.q: int4 with groups of 32, symmetric, a\.k: floats, a\.v: int4"),
        ({r".*\.v$": {"bits": 3}}, r"a\.v: int3 with groups of 32, symmetric"),
        ({r".*\.q$": {"sym": False}}, r"a\.q: int4 with groups of 32, asymmetric"),
        ({r".*\.q$": {"group_size": -1}}, r"a\.q: int4 with one scale per row, symmetric"),
    ],
)
def test_parts_of_a_fused_layer_that_differ(monkeypatch, rules, kinds):
    on_rank(monkeypatch, 0, 1)
    with pytest.raises(
        RacError,
        match=rf"^a\.qkv: its parts are quantized differently \(.*{kinds}.*; quantize them alike",
    ):
        make("qkv", made(dynamic=rules))


def test_modules_that_the_checkpoint_has_in_floats(monkeypatch):
    """vLLM reads their names from the dtypes of the files; here they are given."""
    on_rank(monkeypatch, 0, 1)
    config = made(modules_in_block_to_quantize=["a.q", "a.k", "a.v"])
    assert type(make("row", config).quant_method) is linear.UnquantizedLinearMethod
    assert type(make("qkv", config).quant_method) is GptqAwqLinearMethod
    assert config.summary.expected == 1


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"symmetric": False}, "Unsupported quantization config: bits=4, sym=False"),
        ({"bits": 2}, "Unsupported quantization config: bits=2, sym=True"),
        (
            {"desc_act": True},
            r"GPTQ group activation ordering \(desc_act=True\) is no longer supported",
        ),
        ({"dynamic": {r".*\.row": {"desc_act": True}}}, "is enabled by dynamic rule"),
        (
            {"dynamic": {r".*\.row": {"bits": 3}}},
            "Unsupported quantization config: bits=3, sym=True",
        ),
        ({"group": 48}, "Marlin does not support group_size = 48"),
    ],
)
def test_why_vllm_has_no_method(monkeypatch, changes, why):
    """What it would say without the option, for a layer that our kernel does not take after all."""
    on_rank(monkeypatch, 0, 1)
    inner = make("row", made(**changes)).quant_method.inner
    assert isinstance(inner, RefusedByVllm)
    with pytest.raises(ValueError, match=why):
        inner.create_weights(None)


def test_rules_that_name_the_parts_of_a_fused_layer(monkeypatch):
    """vLLM asks for the fused layer's name, so its own method would read the parts with other bits."""
    on_rank(monkeypatch, 0, 1)
    by_parts = made(symmetric=True, dynamic={r".*\.(q|k|v)$": {"group_size": 96}})
    inner = make("qkv", by_parts).quant_method.inner
    assert isinstance(inner, RefusedByVllm)
    assert inner.reason.startswith("it reads the dynamic rules by the name of the fused layer")
    assert isinstance(make("qkv", made()).quant_method.inner, AutoGPTQLinearMethod)


def test_one_scale_per_row_has_no_order(monkeypatch):
    """vLLM takes desc_act for nothing there, too."""
    on_rank(monkeypatch, 0, 1)
    assert isinstance(
        make("row", made(group=None, desc_act=True)).quant_method.inner, AutoGPTQLinearMethod
    )


def test_the_order_of_columns_reaches_the_layers():
    """vLLM's own mapper drops it from the weights that are loaded."""
    assert AutoGPTQConfig.get_checkpoint_weight_mapper().map_name("a.q.g_idx") is None
    mapper = made().get_checkpoint_weight_mapper()
    for name in ("a.q.g_idx", "a.q.qweight", "a.shared_experts.up.g_idx", "a.experts.0.up.qweight"):
        assert mapper.map_name(name) == name
    assert mapper.map_name("a.experts.0.up.g_idx") is None


def test_experts_stay_with_vllm(monkeypatch):
    on_rank(monkeypatch, 0, 1)
    experts = RoutedExperts.__new__(RoutedExperts)
    torch.nn.Module.__init__(experts)
    given = AutoGPTQLinearMethod(AutoGPTQConfig.from_config({**gptq_config(), "desc_act": False}))
    monkeypatch.setattr(AutoGPTQConfig, "get_quant_method", lambda self, layer, prefix: given)
    config = made()
    assert config.get_quant_method(experts, "a.experts") is given
    assert config.summary.expected == 1
    with pytest.raises(
        RacError,
        match=r"^a\.experts: .* dense experts of few bits have no kernel, and vLLM .*sym=False",
    ):
        made(symmetric=False).get_quant_method(experts, "a.experts")


def test_names_and_dtypes():
    config = made()
    assert torch.float32 in config.get_supported_act_dtypes()
    assert config.scheme_of(linear.LinearBase.__new__(linear.LinearBase), "a.b") == Scheme(
        4, 32, True
    )
    assert {pair for pair in config.TYPE_MAP if pair[0] in (4, 8) and pair[1]} == {
        *AutoGPTQConfig.TYPE_MAP
    }
