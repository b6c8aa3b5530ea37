"""The config: whose checkpoints, the method of each layer, what is read before loading."""

import copy
import pickle
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from tests.vllm_plugin.vllm_fixtures import needs_vllm, on_rank

needs_vllm()

from vllm.config import set_current_vllm_config
from vllm.model_executor.layers import linear
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsKVCacheMethod,
    CompressedTensorsLinearMethod,
)
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
    CompressedTensorsWNA16,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.utils import WeightsMapper

from rac_modifier.errors import RacError
from rac_modifier.formats.quantization_config import with_int8_activations, with_packed
from rac_modifier.kernels.cpu.support import Support
from rac_modifier.kernels.interface import Decision, stay_dense
from rac_modifier.vllm_plugin import config as plugin_config
from rac_modifier.vllm_plugin.config import LoadReport, RacConfig
from rac_modifier.vllm_plugin.layouts import CodesLayout, GptqAwqLayout, PackedLayout
from rac_modifier.vllm_plugin.linear import RacLinearMethod
from rac_modifier.vllm_plugin.vocabulary import VocabularyMethod
from tests.vllm_plugin.layer_kinds import make
from tests.vllm_plugin.stored_forms import (
    PACKED,
    awq_config,
    gptq_config,
    quantization,
    quantized_sparse,
)
from tests.vllm_plugin.test_layouts import group


def bare(kind: type) -> torch.nn.Module:
    """A layer that was made without vLLM's groups of processes."""
    layer = kind.__new__(kind)
    torch.nn.Module.__init__(layer)
    return layer


@pytest.mark.parametrize(
    ("config", "layout"),
    [
        (quantization(), CodesLayout),
        (gptq_config(), GptqAwqLayout),
        (awq_config(), GptqAwqLayout),
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
    with pytest.raises(RacError, match="since it is quantized by 'fp8' and not packed sparse"):
        RacConfig.from_config({"quant_method": "fp8"})


@pytest.mark.parametrize(
    ("entry", "user", "claimed"),
    [
        (quantization(), None, True),
        (quantization(), "compressed-tensors", False),
        (quantization(config_groups={"a": group(["Linear"], bits=8)}), None, False),
        ({"quant_method": "fp8"}, None, False),
    ],
)
def test_a_checkpoint_of_ours_needs_no_option_where_a_kernel_reads_it(
    monkeypatch, entry, user, claimed
):
    monkeypatch.setattr(plugin_config, "support", lambda: Support("avx2", ""))
    ours = SimpleNamespace(rac_sparsity={"storage": "dense", "modules": {}})
    override = RacConfig.override_quantization_method
    assert (override(entry, user, hf_config=ours) == "rac") == claimed
    assert override(entry, None, hf_config=SimpleNamespace()) is None
    monkeypatch.setattr(plugin_config, "support", lambda: Support(None, ""))
    assert override(entry, user, hf_config=ours) is None


def test_apply_vllm_mapper_renames_modules():
    packed = with_packed({}, "sparse-bitmask", {}, ["model.v.a", "x.b"])
    config = RacConfig.from_config(packed["quantization_config"])
    config.int8_activations = ("model.v.c",)
    mapper = WeightsMapper(orig_to_new_prefix={"model.": "language_model."})
    config.apply_vllm_mapper(mapper.get_rename_mapper())
    assert config.layout.ignore == ("language_model.v.a", "x.b")
    assert config.layout.targets == ("Linear",)
    assert config.int8_activations == ("language_model.v.c",)


def model(model_type: str, **settings: bool) -> SimpleNamespace:
    return SimpleNamespace(model_type=model_type, **settings)


@pytest.mark.parametrize(
    ("hf_config", "name", "entry", "refused"),
    [
        (model("falcon", new_decoder_architecture=True, multi_query=True), "query_key_value",
         PACKED, "query_key_value"),
        (model("falcon", new_decoder_architecture=False, multi_query=False), "query_key_value",
         quantization(), "query_key_value"),
        # a single head of keys, as Falcon-7B has: the order stays
        (model("falcon", new_decoder_architecture=False, multi_query=True), "query_key_value",
         PACKED, None),
        (model("falcon", new_decoder_architecture=True, multi_query=True), "dense", PACKED, None),
        (model("bloom"), "query_key_value", PACKED, "query_key_value"),
        (model("telechat"), "key_value", gptq_config(), "key_value"),
        (model("llama4"), "qkv_proj", PACKED, "q_proj"),
        (model("llama4_text"), "qkv_proj", awq_config(), "q_proj"),
        (model("llama4_text"), "qkv_proj", quantization(symmetric=False), "q_proj"),
        (model("llama4_text"), "qkv_proj", quantization(), None),  # vLLM reorders these codes
        (model("llama4_text"), "qkv_proj",
         {**PACKED, "sparsity_config": {**PACKED["sparsity_config"],
                                        "ignore": ["re:.*q_proj", "re:.*k_proj"]}}, None),
        (model("llama"), "qkv_proj", PACKED, None),
    ],
)  # fmt: skip
def test_rows_that_vllm_reorders_in_dense_weights_alone_are_refused(
    tmp_path, hf_config, name, entry, refused
):
    config = RacConfig.from_config(entry)
    config.maybe_update_config(str(tmp_path), hf_config=hf_config)
    config = pickle.loads(pickle.dumps(config))  # vLLM sends it to its workers
    config.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    layer = bare(linear.ColumnParallelLinear)
    says = rf"^a\.{refused}: vLLM reorders its rows"
    with pytest.raises(RacError, match=says) if refused else nullcontext():
        assert type(config.get_quant_method(layer, f"a.{name}")) is RacLinearMethod


def test_random_weights_are_refused():
    random = SimpleNamespace(load_config=SimpleNamespace(load_format="dummy"))
    layer = bare(linear.ColumnParallelLinear)
    refused = pytest.raises(RacError, match=r"^--load-format dummy: random weights cannot")
    with set_current_vllm_config(random), refused:
        RacConfig.from_config(PACKED).get_quant_method(layer, "a.b")


def test_a_quantized_kv_cache_next_to_packed_weights_in_floats():
    """vLLM's attention asks the config for the scheme, and the method for the scales."""
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}
    entry = {"quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": scheme}
    packed = with_packed({"quantization_config": entry}, "sparse-bitmask", {}, [])
    config = RacConfig.from_config(packed["quantization_config"])
    assert config.kv_cache_scheme == scheme
    method = config.get_quant_method(bare(Attention), "model.layers.0.self_attn.attn")
    assert type(method) is CompressedTensorsKVCacheMethod
    assert RacConfig.from_config(PACKED).kv_cache_scheme is None


@pytest.mark.parametrize("within", ["", "draft_model."])
def test_the_method_of_each_layer(monkeypatch, within):
    """Codes get ours, int8 vLLM's with a reason, and what is ignored vLLM's without one."""
    on_rank(monkeypatch, 0, 1)
    # vLLM has no int8 on a CPU
    monkeypatch.setattr(CompressedTensorsWNA16, "create_weights", lambda self, **sizes: None)
    groups = {"a": group(["re:.*column", "re:.*row"]), "c": group(["a.gate", "a.up"], bits=8)}
    config = RacConfig.from_config(quantization(config_groups=groups, ignore=["a.row"]))
    kinds = ("column", "row", "merged")
    methods = {kind: make(kind, config, within=within).quant_method for kind in kinds}
    assert {kind: type(method) for kind, method in methods.items()} == {
        "column": RacLinearMethod,
        "row": linear.UnquantizedLinearMethod,
        "merged": CompressedTensorsLinearMethod,
    }
    assert methods["column"].shards.modules == ["a.column"]
    assert config.report.expected == 2
    reason = config.report.decisions["a.gate_up"].reason
    assert reason == "vLLM's own method because its weights are int8"
    # quantized, and not packed
    entry = quantized_sparse("sparse-bitmask", "int8", [])
    entry["sparsity_config"]["ignore"] = ["a.row"]
    method = make("row", RacConfig.from_config(entry), within=within).quant_method
    assert type(method) is CompressedTensorsLinearMethod


@pytest.mark.parametrize("entry", [PACKED, quantization(), gptq_config(), awq_config()])
def test_heads_and_embeddings_in_floats_are_vllms(entry):
    config = RacConfig.from_config(entry)
    for kind in (ParallelLMHead, VocabParallelEmbedding, torch.nn.Embedding):
        assert config.get_quant_method(bare(kind), "lm_head") is None


def test_stored_heads_and_embeddings():
    groups = {"g": group(["Linear"]), "h": group(["re:.*embed"], bits=8)}
    config = RacConfig.from_config(quantization(config_groups=groups))
    embedding = bare(VocabParallelEmbedding)
    assert type(config.get_quant_method(embedding, "model.embed_tokens")) is VocabularyMethod
    # in floats, but it may be tied
    assert type(config.get_quant_method(bare(ParallelLMHead), "lm_head")) is VocabularyMethod
    gptq = RacConfig.from_config(gptq_config(lm_head=True))
    assert type(gptq.get_quant_method(bare(ParallelLMHead), "lm_head")) is VocabularyMethod
    assert gptq.get_quant_method(embedding, "model.embed_tokens") is None


def recorded(**changes) -> SimpleNamespace:
    """A config of transformers with our record."""
    written = with_packed({}, "sparse-bitmask", {"model.a": "unstructured"}, [])
    return SimpleNamespace(
        rac_sparsity=with_int8_activations(written, ["a.q", "a.k", "a.v"])["rac_sparsity"] | changes
    )


def test_the_record_of_config_json(monkeypatch, tmp_path):
    on_rank(monkeypatch, 0, 1)
    config = RacConfig.from_config(quantization())
    config.maybe_update_config(str(tmp_path), recorded())
    bits = {name: make(name, config).quant_method.activation_bits for name in ("qkv", "row")}
    assert bits == {"qkv": 8, "row": 16}
    with pytest.raises(RacError, match=r"int8_activations is 'a': Input should be a valid tuple"):
        config.maybe_update_config(str(tmp_path), recorded(int8_activations="a"))


def test_the_order_of_columns_reaches_the_layers():
    """vLLM's own mapper drops it from the weights that are loaded."""
    base = super(RacConfig, RacConfig).get_checkpoint_weight_mapper()
    assert base.map_name("a.q.g_idx") is None
    assert RacConfig.get_checkpoint_weight_mapper().map_name("a.q.g_idx") == "a.q.g_idx"


def test_the_report_comes_with_the_last_layer_and_has_every_decision(said, monkeypatch):
    kept: list[int] = []
    monkeypatch.setattr(plugin_config, "keep_freed_memory", lambda: kept.append(len(said)))
    report = LoadReport(expected=6)
    report.add("e", Decision(False, "vLLM", "vLLM's own method", 1.0, 1.0))
    report.add("a", Decision(True, "sparse kernel avx2", "", 1.1, 1.98))
    report.add("b", Decision(True, "sparse kernel avx2", "", 1.3, 1.95))
    report.add("c", None)  # not compressed
    report.add("f", stay_dense("it is small", torch.bfloat16))
    assert said == []
    report.add("d", stay_dense("it is small", torch.bfloat16))
    (text,) = said
    assert text.splitlines() == [
        "rac: 2 of 5 compressed layers run on a kernel",
        "  vLLM's own method: 1, such as e",
        "  sparse kernel avx2: 2, such as a",
        "  dense because it is small: 2, such as f",
    ]
    assert kept == [1]  # when all is loaded


def test_a_request_without_effect_is_said(said, monkeypatch):
    monkeypatch.delattr(plugin_config, "keep_freed_memory")  # not called: vLLM's own kernels run
    LoadReport(True, expected=1).add("a", stay_dense("it is small", torch.bfloat16))
    assert said[0].endswith("--quantization rac has no effect on this model here; leave it out")
