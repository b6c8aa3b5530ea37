"""The config: whose checkpoints, the method of each layer, what is read before loading."""

from __future__ import annotations

import copy
import json
import math
from types import SimpleNamespace

import pytest
import torch

from tests.vllm_plugin.vllm_fixtures import needs_vllm, on_rank

needs_vllm()

from vllm.model_executor.layers import linear  # noqa: E402
from vllm.model_executor.layers.fused_moe import RoutedExperts  # noqa: E402
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (  # noqa: E402
    CompressedTensorsConfig,
    CompressedTensorsLinearMethod,
)
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (  # noqa: E402
    CompressedTensorsWNA16,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (  # noqa: E402
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.utils import WeightsMapper  # noqa: E402

from rac_modifier.checkpoint.sparsity_config import with_int8_activations, with_packed  # noqa: E402
from rac_modifier.errors import RacError  # noqa: E402
from rac_modifier.kernels.cpu.crossover import Crossover  # noqa: E402
from rac_modifier.kernels.cpu.support import Support  # noqa: E402
from rac_modifier.vllm_plugin import config as plugin_config  # noqa: E402
from rac_modifier.vllm_plugin.config import RacConfig, crossovers, fused_modules  # noqa: E402
from rac_modifier.vllm_plugin.layouts import CodesLayout, PackedLayout, WordsLayout  # noqa: E402
from rac_modifier.vllm_plugin.linear import RacLinearMethod  # noqa: E402
from rac_modifier.vllm_plugin.vocabulary import StoredMethod, VocabularyMethod  # noqa: E402
from tests.vllm_plugin.gptq_awq import awq_config, gptq_config  # noqa: E402
from tests.vllm_plugin.layer_kinds import make  # noqa: E402
from tests.vllm_plugin.test_layouts import group  # noqa: E402
from tests.vllm_plugin.vllm_fixtures import quantization_config  # noqa: E402
from tests.vllm_plugin.w4a16 import quantization  # noqa: E402

PACKED = with_packed({}, "sparse-bitmask", {"model.a": "unstructured"}, 0.5, ["lm_head"])[
    "quantization_config"
]


def bare(kind: type) -> torch.nn.Module:
    """A layer that was made without vLLM's groups of processes."""
    layer = kind.__new__(kind)
    torch.nn.Module.__init__(layer)
    return layer


@pytest.mark.parametrize(
    ("config", "layout"),
    [
        (quantization(), CodesLayout),
        (gptq_config(), WordsLayout),
        (awq_config(), WordsLayout),
        (PACKED, PackedLayout),
    ],
)
def test_others_are_ours_on_request_only(config, layout):
    before = copy.deepcopy(config)
    ours = layout is PackedLayout
    assert (RacConfig.override_quantization_method(config, None) == "rac") == ours
    assert (RacConfig.override_quantization_method(config, config["quant_method"]) == "rac") == ours
    assert RacConfig.override_quantization_method(config, "rac") == "rac"
    made = RacConfig.from_config(config)
    assert type(made.layout) is layout
    assert made.report.requested != ours
    assert config == before
    assert torch.float32 in made.get_supported_act_dtypes()


def test_quantization_of_another_kind_on_request_is_an_error():
    with pytest.raises(RacError, match="since it is quantized by 'fp8' and not packed sparse"):
        RacConfig.from_config({"quant_method": "fp8"})


def test_apply_vllm_mapper_renames_modules():
    packed = with_packed({}, "sparse-bitmask", {}, 0.5, ["model.v.a", "x.b"])
    config = RacConfig.from_config(packed["quantization_config"])
    config.int8_activations = ("model.v.c",)
    mapper = WeightsMapper(orig_to_new_prefix={"model.": "language_model."})
    config.apply_vllm_mapper(mapper.get_rename_mapper())
    assert config.layout.ignore == ("language_model.v.a", "x.b")
    assert config.layout.targets == ("Linear",)
    assert config.int8_activations == ("language_model.v.c",)


@pytest.mark.parametrize("within", ["", "draft_model."])
def test_the_method_of_each_layer(monkeypatch, within):
    """Codes get ours, int8 vLLM's with a reason, and what is ignored vLLM's without one."""
    on_rank(monkeypatch, 0, 1)
    # vLLM has no int8 on a CPU
    monkeypatch.setattr(CompressedTensorsWNA16, "create_weights", lambda self, **sizes: None)
    groups = {"a": group(["re:.*column", "re:.*row"]), "c": group(["a.gate", "a.up"], bits=8)}
    config = RacConfig.from_config(quantization(config_groups=groups, ignore=["a.row"]))
    methods = {
        kind: make(kind, config, within=within).quant_method for kind in ("column", "row", "merged")
    }
    assert {kind: type(method) for kind, method in methods.items()} == {
        "column": RacLinearMethod,
        "row": linear.UnquantizedLinearMethod,
        "merged": CompressedTensorsLinearMethod,
    }
    assert methods["column"].shards.modules == ["a.column"]
    assert config.report.expected == 2
    reason = config.report.decisions["a.gate_up"].reason
    assert reason == "vLLM's own method because its weights are int8"


def test_quantized_layers_that_are_not_packed_are_vllms(monkeypatch):
    on_rank(monkeypatch, 0, 1)
    entry = quantization_config("sparse-bitmask", "int8", [])
    entry["sparsity_config"]["ignore"] = ["a.row"]
    config = RacConfig.from_config(entry)
    assert type(make("row", config).quant_method) is CompressedTensorsLinearMethod
    assert type(make("column", config).quant_method) is RacLinearMethod


def test_experts_of_codes_are_vllms(monkeypatch):
    config, method = RacConfig.from_config(quantization()), object()
    monkeypatch.setattr(
        CompressedTensorsConfig, "get_quant_method", lambda self, layer, prefix: method
    )
    assert config.get_quant_method(bare(RoutedExperts), "a.experts") is method
    assert "dense experts of few bits" in config.report.decisions["a.experts"].reason


@pytest.mark.parametrize("entry", [PACKED, quantization(), gptq_config(), awq_config()])
def test_heads_and_embeddings_in_floats_are_vllms(entry):
    config = RacConfig.from_config(entry)
    for kind in (ParallelLMHead, VocabParallelEmbedding, torch.nn.Embedding):
        assert config.get_quant_method(bare(kind), "lm_head") is None


def test_stored_heads_and_embeddings():
    groups = {"g": group(["Linear"]), "h": group(["re:.*embed"], bits=8)}
    config = RacConfig.from_config(quantization(config_groups=groups))
    embedding = bare(VocabParallelEmbedding)
    assert type(config.get_quant_method(embedding, "model.embed_tokens")) is StoredMethod
    # in floats, but it may be tied
    assert type(config.get_quant_method(bare(ParallelLMHead), "lm_head")) is VocabularyMethod
    gptq = RacConfig.from_config(gptq_config(lm_head=True))
    assert type(gptq.get_quant_method(bare(ParallelLMHead), "lm_head")) is StoredMethod
    assert gptq.get_quant_method(embedding, "model.embed_tokens") is None


def recorded(**changes) -> SimpleNamespace:
    """A config of transformers with our record."""
    written = with_packed({}, "sparse-bitmask", {"model.a": "unstructured"}, 0.5, [])
    return SimpleNamespace(
        rac_sparsity=with_int8_activations(written, ["a.q", "a.k", "a.v"])["rac_sparsity"] | changes
    )


@pytest.mark.parametrize(
    ("entry", "kind"),
    [(quantization(), "int4"), (quantization_config("sparse-bitmask", "int8", []), "int8")],
)
def test_the_record_of_config_json(monkeypatch, tmp_path, entry, kind):
    asked = []
    monkeypatch.setattr(plugin_config, "crossovers", lambda *args: asked.append(args) or {kind: 7})
    on_rank(monkeypatch, 0, 1)
    config = RacConfig.from_config(entry)
    config.maybe_update_config(str(tmp_path), recorded())
    assert asked == [((kind,), True)]
    assert config.crossovers == {kind: 7}
    bits = {name: make(name, config).quant_method.activation_bits for name in ("qkv", "row")}
    assert bits == {"qkv": 8, "row": 16}
    with pytest.raises(RacError, match=r"int8_activations is 'a', not a list of module names"):
        config.maybe_update_config(str(tmp_path), recorded(int8_activations="a"))


@pytest.mark.parametrize("entry", [PACKED, quantization(), gptq_config(), awq_config()])
def test_a_lost_file_is_noticed_before_loading(monkeypatch, tmp_path, entry):
    monkeypatch.setattr(plugin_config, "crossovers", lambda *args: {})
    config = RacConfig.from_config(entry)
    config.maybe_update_config(str(tmp_path), SimpleNamespace())
    index = {"weight_map": {"a": "model-1.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(RacError, match=r"model-1\.safetensors"):
        config.maybe_update_config(str(tmp_path), SimpleNamespace())


def test_pruned_weights_under_codes_are_said(monkeypatch, tmp_path):
    said = []
    monkeypatch.setattr(plugin_config, "crossovers", lambda *args: {})
    monkeypatch.setattr(plugin_config.logger, "info", said.append)
    config = RacConfig.from_config(quantization())
    config.maybe_update_config(str(tmp_path), recorded(modules={}))
    assert said == []
    config.maybe_update_config(str(tmp_path), recorded())
    assert "`rac pack`" in said[0]


def test_gptq_on_a_device_without_a_kernel_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(plugin_config, "backend_of", lambda device: f"no kernel for {device}")
    with pytest.raises(RacError, match="since no kernel for cpu; leave it out"):
        RacConfig.from_config(gptq_config()).maybe_update_config(str(tmp_path), SimpleNamespace())


def test_the_order_of_columns_reaches_the_layers():
    """vLLM's own mapper drops it from the weights that are loaded."""
    base = super(RacConfig, RacConfig).get_checkpoint_weight_mapper()
    assert base.map_name("a.q.g_idx") is None
    assert RacConfig().get_checkpoint_weight_mapper().map_name("a.q.g_idx") == "a.q.g_idx"


def test_fused_layers():
    fused = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    assert fused_modules("m.attn.qkv_proj", fused) == [f"m.attn.{name}_proj" for name in "qkv"]
    assert fused_modules("m.attn.o_proj", fused) == ["m.attn.o_proj"]
    assert fused_modules("qkv_proj", fused) == ["q_proj", "k_proj", "v_proj"]


class TestCrossovers:
    @pytest.fixture(autouse=True)
    def _measured(self, monkeypatch):
        self.asked: list[list[str]] = []

        def measure(kinds):
            self.asked.append([*kinds])
            return [Crossover(kind, 512.0, {}) for kind in kinds]

        monkeypatch.setattr(plugin_config, "measure_crossovers", measure)
        monkeypatch.delenv("VLLM_BATCH_INVARIANT", raising=False)

    @pytest.mark.parametrize(
        ("isa", "kinds"),
        [
            (None, []),
            ("portable", []),
            ("avx2", ["floats", "int8"]),
            ("avx512", ["floats", "int8", "int8 with 8-bit activations"]),
        ],
    )
    def test_what_is_measured(self, monkeypatch, isa, kinds):
        monkeypatch.setattr(
            plugin_config, "support", lambda: Support(isa, "a test's", isa == "avx512")
        )
        assert crossovers(("floats", "int8"), True) == dict.fromkeys(kinds, 512.0)
        assert self.asked == ([kinds] if kinds else [])

    def test_one_way_for_all_where_batches_must_not_matter(self, monkeypatch):
        monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
        assert {*crossovers(("int4",), False).values()} == {math.inf}
        assert self.asked == []
