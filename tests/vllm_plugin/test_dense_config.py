"""The config of dense checkpoints of few bits: which layers get the kernel, and what vLLM runs."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

from tests.vllm_plugin.vllm_fixtures import needs_vllm, on_rank

needs_vllm()

from vllm.model_executor.layers import linear  # noqa: E402
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (  # noqa: E402
    CompressedTensorsConfig,
    CompressedTensorsLinearMethod,
)
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (  # noqa: E402
    CompressedTensorsWNA16,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead  # noqa: E402

from rac_modifier.errors import RacError  # noqa: E402
from rac_modifier.vllm_plugin import METHOD, activations, dense_config  # noqa: E402
from rac_modifier.vllm_plugin.dense_config import DenseCodesConfig  # noqa: E402
from rac_modifier.vllm_plugin.dense_linear import DenseCodesLinearMethod  # noqa: E402
from rac_modifier.vllm_plugin.head import RoundedMethod  # noqa: E402
from rac_modifier.vllm_plugin.quant_config import RacSparseConfig  # noqa: E402
from rac_modifier.vllm_plugin.stored_vocabulary import StoredMethod, why_not  # noqa: E402
from tests.vllm_plugin.layer_kinds import make  # noqa: E402
from tests.vllm_plugin.w4a16 import quantization  # noqa: E402

INPUTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def group_of(
    targets: list[str], bits: int = 4, inputs: dict[str, object] | None = None, **changes: object
):
    group = quantization(bits=bits)["config_groups"]["group_0"]
    group["weights"] |= changes
    return {**group, "targets": targets, "input_activations": inputs}


def head() -> torch.nn.Module:
    """A head that was made without vLLM's groups of processes."""
    layer = ParallelLMHead.__new__(ParallelLMHead)
    torch.nn.Module.__init__(layer)
    return layer


def test_on_request_only():
    config = quantization()
    assert RacSparseConfig.override_quantization_method(config, None) is None
    assert RacSparseConfig.override_quantization_method(config, "compressed-tensors") is None
    assert RacSparseConfig.override_quantization_method(config, METHOD) == METHOD
    made = RacSparseConfig.from_config(config)
    assert isinstance(made, DenseCodesConfig)
    assert isinstance(made, CompressedTensorsConfig)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"config_groups": {"g": group_of(["Linear"], bits=8)}}, "its weights are int8"),
        ({"config_groups": {"g": group_of(["Linear"], bits=5)}}, "its weights are int5"),
        ({"config_groups": {"g": group_of(["Linear"], type="float")}}, "its weights are float4"),
        (
            {"config_groups": {"g": group_of(["Linear"], inputs=INPUTS)}},
            "its activations are quantized too",
        ),
        ({"format": "mixed-precision"}, "its format is mixed-precision, not pack-quantized"),
        ({"config_groups": {}}, "it quantizes nothing"),
    ],
)
def test_a_checkpoint_on_which_the_option_has_no_effect(changes, reason):
    config = quantization(**changes)
    with pytest.raises(RacError, match=rf"^--quantization rac: .*\({reason}\).*leave it out"):
        RacSparseConfig.from_config(config)


def test_scales_per_tensor_have_no_kernel():
    config = CompressedTensorsConfig.from_config(
        quantization(config_groups={"g": group_of(["Linear"], strategy="tensor", group_size=None)})
    )
    (scheme,) = config.target_scheme_map.values()
    assert dense_config.why_not_codes(scheme, "pack-quantized") == "its scales are per tensor"


def test_reordered_columns_are_refused_by_vllm_with_its_reason():
    config = quantization(config_groups={"g": group_of(["Linear"], actorder="group")})
    with pytest.raises(ValueError, match=r"actorder='group'.* no longer supported"):
        RacSparseConfig.from_config(config)
    for order in ("weight", "static"):
        RacSparseConfig.from_config(
            quantization(config_groups={"g": group_of(["Linear"], actorder=order)})
        )


@pytest.mark.parametrize("within", ["", "draft_model."])
def test_the_method_of_each_layer(monkeypatch, within):
    """int4 in groups of 32, and int3 per row, get ours, int8 vLLM's with a reason, and what is ignored vLLM's without one."""
    on_rank(monkeypatch, 0, 1)
    monkeypatch.setattr(
        CompressedTensorsWNA16, "create_weights", lambda self, **sizes: None
    )  # no int8 on a CPU
    groups = {
        "a": group_of(["re:.*column", "re:.*row"]),
        "b": group_of(
            ["a.q", "a.k", "a.v"], bits=3, symmetric=False, strategy="channel", group_size=None
        ),
        "c": group_of(["a.gate", "a.up"], bits=8),
    }
    config = RacSparseConfig.from_config(quantization(config_groups=groups, ignore=["a.row"]))
    methods = {
        kind: make(kind, config, within=within).quant_method
        for kind in ("column", "row", "qkv", "merged")
    }
    assert {kind: type(method) for kind, method in methods.items()} == {
        "column": DenseCodesLinearMethod,
        "row": linear.UnquantizedLinearMethod,
        "qkv": DenseCodesLinearMethod,
        "merged": CompressedTensorsLinearMethod,
    }
    column, qkv = methods["column"].shards, methods["qkv"].shards
    assert (column.group, column.symmetric, column.bits, column.modules) == (
        32,
        True,
        4,
        ["a.column"],
    )
    assert (qkv.group, qkv.symmetric, qkv.bits, qkv.modules) == (
        None,
        False,
        3,
        ["a.q", "a.k", "a.v"],
    )
    assert (config.summary.expected, config.summary.kernel) == (3, "an int4 or int3 kernel")


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (
            group_of(["a.k"], group_size=16),
            "the parts of this fused layer are quantized differently",
        ),
        (
            group_of(["a.k"], symmetric=False),
            "the parts of this fused layer are quantized differently",
        ),
        (group_of(["a.k"], bits=3), "the parts of this fused layer are quantized differently"),
        (group_of(["a.k"], actorder="static"), None),  # how codes were chosen makes no difference
    ],
)
def test_parts_of_a_fused_layer(monkeypatch, other, reason):
    on_rank(monkeypatch, 0, 1)
    groups = {"a": group_of(["a.q", "a.v"]), "b": other}
    config = RacSparseConfig.from_config(quantization(config_groups=groups))
    method = make("qkv", config).quant_method
    assert isinstance(method, CompressedTensorsLinearMethod) == (reason is not None)
    if reason is None:
        return
    done = []
    layer = SimpleNamespace(scheme=SimpleNamespace(process_weights_after_loading=done.append))
    method.process_weights_after_loading(layer)
    assert done == [layer]
    assert config.summary.decisions["a.qkv"].reason == f"vLLM's own method because {reason}"


def test_experts_and_transforms_stay_with_vllm(monkeypatch):
    on_rank(monkeypatch, 0, 1)
    config = RacSparseConfig.from_config(quantization(ignore=[]))
    given = CompressedTensorsLinearMethod(config)
    monkeypatch.setattr(
        CompressedTensorsConfig, "get_quant_method", lambda self, layer, prefix: given
    )
    from vllm.model_executor.layers.fused_moe import RoutedExperts

    experts = RoutedExperts.__new__(RoutedExperts)
    torch.nn.Module.__init__(experts)
    assert (
        config._why_not(experts, "a.experts", given) == "dense experts of few bits have no kernel"
    )

    class Transformed(CompressedTensorsLinearMethod):
        pass

    layer = torch.nn.Linear(32, 32)
    assert (
        config._why_not(layer, "a.b", Transformed(config))
        == "its inputs or outputs are transformed"
    )
    assert config._why_not(layer, "a.b", given) is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"bits": 8}, None),
        ({"bits": 8, "inputs": INPUTS}, None),
        ({"bits": 3}, "its weights are int3"),
        ({"bits": 8, "symmetric": False}, "its weights are asymmetric int8"),
        ({"type": "float"}, "its weights are float4"),
        ({"inputs": INPUTS}, "its activations are quantized too"),
        ({"strategy": "tensor", "group_size": None}, "its scales are per tensor"),
    ],
)
def test_a_quantized_head(monkeypatch, changes, reason):
    """The kernels' where they read it; else vLLM's own, with the reason in the summary."""
    on_rank(monkeypatch, 0, 1)
    groups = {"g": group_of(["Linear"]), "h": group_of(["lm_head"], **changes)}
    config = RacSparseConfig.from_config(quantization(config_groups=groups, ignore=[]))
    scheme = config.get_scheme_dict(head(), "lm_head")
    assert why_not(scheme, "pack-quantized") == reason
    given = CompressedTensorsLinearMethod(config)
    monkeypatch.setattr(
        CompressedTensorsConfig, "get_quant_method", lambda self, layer, prefix: given
    )
    method = config.get_quant_method(head(), "lm_head")
    assert isinstance(method, StoredMethod) == (reason is None)
    assert config.summary.expected == (reason is not None)


def test_a_head_alone_is_quantized():
    """The option has an effect then, for int8 too, which linear layers have no kernel for."""
    groups = {"h": group_of(["re:.*lm_head"], bits=8)}
    assert isinstance(
        RacSparseConfig.from_config(quantization(config_groups=groups, ignore=[])), DenseCodesConfig
    )


def test_the_head_on_request(monkeypatch):
    on_rank(monkeypatch, 0, 1)
    config = RacSparseConfig.from_config(quantization())
    assert config.get_quant_method(head(), "lm_head") is None
    monkeypatch.setenv("RAC_LM_HEAD", "int8")
    method = config.get_quant_method(head(), "lm_head")
    assert isinstance(method, RoundedMethod)
    assert method.bits == 8
    groups = {"g": group_of(["Linear", "lm_head"])}
    quantized = RacSparseConfig.from_config(quantization(config_groups=groups, ignore=[]))
    with pytest.raises(
        RacError, match="RAC_LM_HEAD=int8: the checkpoint has a quantized head already; unset"
    ):
        quantized.get_quant_method(head(), "lm_head")


def test_embeddings_and_attention_are_vllms(monkeypatch):
    config = RacSparseConfig.from_config(quantization())
    assert config.get_quant_method(torch.nn.Embedding(4, 4), "model.embed_tokens") is None


def test_pruned_weights_that_are_stored_dense_are_said(monkeypatch, tmp_path):
    said = []
    monkeypatch.setattr(dense_config.logger, "info", said.append)
    config = RacSparseConfig.from_config(quantization())
    config.maybe_update_config(str(tmp_path), hf_config=SimpleNamespace())
    alone = {
        "storage": "dense",
        "modules": {},
        "int8_activations": ["a.q"],
    }  # quantized and not pruned
    config.maybe_update_config(str(tmp_path), hf_config=SimpleNamespace(rac_sparsity=alone))
    assert said == []
    config.maybe_update_config(
        str(tmp_path), hf_config=SimpleNamespace(rac_sparsity={"modules": {"a": "2:4"}})
    )
    assert "`rac pack`" in said[0]
    (tmp_path / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "model-1.safetensors"}}'
    )
    with pytest.raises(RacError, match=r"model-1\.safetensors"):
        config.maybe_update_config(str(tmp_path))


@pytest.mark.parametrize(
    ("requested", "expected"), [(None, (8, 16, 16)), ("int16", (16, 16, 16)), ("int8", (8, 8, 8))]
)
def test_recorded_layers_take_8_bits(monkeypatch, tmp_path, requested, expected):
    """A fused layer where all its parts are recorded; the names are those that vLLM gives."""
    from vllm.model_executor.models.utils import WeightsMapper

    on_rank(monkeypatch, 0, 1)
    monkeypatch.setattr(
        activations, "support", lambda: SimpleNamespace(isa="avx512", reason="a test's")
    )
    kinds = []
    monkeypatch.setattr(dense_config, "crossovers", lambda *asked: kinds.append(asked) or {})
    monkeypatch.delenv("RAC_ACTIVATIONS", raising=False)
    if requested:
        monkeypatch.setenv("RAC_ACTIVATIONS", requested)
    config = RacSparseConfig.from_config(quantization())
    recorded = ["b.q", "b.k", "b.v", "b.gate", "b.column", "b.other"]
    record = {"storage": "dense", "modules": {}, "int8_activations": recorded}
    config.maybe_update_config(str(tmp_path), hf_config=SimpleNamespace(rac_sparsity=record))
    assert config.int8_activations == tuple(recorded)
    assert kinds == [(("int4",), 8 in expected)]
    mapper = WeightsMapper(orig_to_new_prefix={"b.": "a."})
    config.apply_vllm_mapper(mapper.get_rename_mapper())
    methods = [make(kind, config).quant_method for kind in ("qkv", "merged", "row")]
    assert tuple(method.activation_bits for method in methods) == expected
    assert make("column", config).quant_method.activation_bits == expected[0]


def test_a_malformed_record_is_refused(tmp_path):
    config = RacSparseConfig.from_config(quantization())
    with pytest.raises(
        RacError, match=r"rac_sparsity\.int8_activations is 'a\.q', not a list of module names"
    ):
        config.maybe_update_config(
            str(tmp_path), SimpleNamespace(rac_sparsity={"int8_activations": "a.q"})
        )


def test_a_config_is_not_changed_by_what_is_made_from_it():
    config = quantization()
    before = copy.deepcopy(config)
    RacSparseConfig.from_config(config)
    assert config == before
