"""Which checkpoints are ours, and which of their layers are stored sparse."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rac_modifier.checkpoint.sparsity_config import with_dense_mark, with_packed
from rac_modifier.errors import RacError
from rac_modifier.vllm_plugin.sparse_layers import (
    SparseLayers,
    fused_modules,
    is_packed,
    is_quantized,
    parse_dense_stored,
    parse_packed,
    stored_name,
)

QKV = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}


def quantization(**sparsity: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "sparsity_config": {"format": "sparse-bitmask", **sparsity},
    }


@pytest.mark.parametrize("format", ["sparse-24-bitmask", "sparse-bitmask"])
def test_what_packing_writes_is_packed(format):
    written = with_packed({}, format, {"a.b": "2:4"}, 0.5, ["lm_head"])["quantization_config"]
    assert is_packed(written)
    assert parse_packed(written) == SparseLayers(format, ("Linear",), ("lm_head",))


OTHERS = [
    None,
    [],
    "compressed-tensors",
    {"quant_method": "gptq", "bits": 4},
    {"quant_method": "compressed-tensors", "config_groups": {}},
    {"quant_method": "compressed-tensors", "sparsity_config": {}},
    {"quant_method": "compressed-tensors", "sparsity_config": {"format": "dense"}},
    {"quant_method": "compressed-tensors", "sparsity_config": {"format": ["sparse-bitmask"]}},
    {"quant_method": "fp8", "sparsity_config": {"format": "sparse-bitmask"}},
]


@pytest.mark.parametrize("other", OTHERS, ids=str)
def test_others_are_left_alone(other):
    assert not is_packed(other)


json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from(["compressed-tensors", "sparse-bitmask", ""]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["quant_method", "sparsity_config", "format", "x"]), inner
        )
    ),
    max_leaves=8,
)


@given(json)
def test_asking_never_raises(anything):
    assert is_packed(anything) in (True, False)


def test_names_patterns_and_classes():
    layers = parse_packed(quantization(targets=["Linear"], ignore=["lm_head", "re:.*gate$"]))
    assert layers.holds("model.layers.0.mlp.up_proj")
    assert not layers.holds("lm_head")
    assert not layers.holds("model.layers.0.mlp.gate")
    assert layers.holds("model.layers.0.mlp.gate_proj")
    named = parse_packed(quantization(targets=["a.b", "re:c"]))
    assert [named.holds(name) for name in ("a.b", "a.bc", "c.d", "x.c")] == [
        True,
        False,
        True,
        False,
    ]


def test_no_targets_means_all_and_no_ignore_none():
    assert parse_packed(quantization()) == SparseLayers("sparse-bitmask", ("Linear",), ())


@pytest.mark.parametrize("value", ["Linear", {"a": 1}, [1], 5])
@pytest.mark.parametrize("key", ["targets", "ignore"])
def test_malformed_lists(key, value):
    with pytest.raises(RacError, match=rf"{key} is .*not a list of module names"):
        parse_packed(quantization(**{key: value}))


def test_a_pattern_that_is_none():
    with pytest.raises(RacError, match=r"ignore has 're:\(', which is no pattern"):
        parse_packed(quantization(ignore=["re:("]))


def test_dense_stored():
    written = with_dense_mark({}, {"model.a": "2:4", "model.b": "unstructured"})
    layers = parse_dense_stored(written["rac_sparsity"])
    assert layers == SparseLayers(None, ("model.a", "model.b"))
    assert layers.holds("model.a")
    assert not layers.holds("model.c")


@pytest.mark.parametrize("record", [{"modules": ["a"]}, {"modules": {"a": 1}}, "dense"])
def test_a_malformed_record(record):
    with pytest.raises(RacError, match=r"config\.json: rac_sparsity.* save the model again"):
        parse_dense_stored(record)


@pytest.mark.parametrize("record", [None, {}, {"modules": {}}])
def test_nothing_recorded(record):
    with pytest.raises(RacError, match="leave out --quantization rac"):
        parse_dense_stored(record)


def test_renaming_as_the_server_does():
    layers = SparseLayers("sparse-bitmask", ("Linear",), ("model.visual.a", "re:model.*"))
    assert layers.names == ["model.visual.a"]
    assert layers.renamed({"model.visual.a": "visual.a"}).ignore == ("visual.a", "re:model.*")


def test_fused_layers():
    assert fused_modules("model.layers.0.self_attn.qkv_proj", QKV) == [
        f"model.layers.0.self_attn.{name}_proj" for name in "qkv"
    ]
    assert fused_modules("model.layers.0.self_attn.o_proj", QKV) == [
        "model.layers.0.self_attn.o_proj"
    ]
    assert fused_modules("qkv_proj", QKV) == ["q_proj", "k_proj", "v_proj"]


def test_quantised_besides():
    assert not is_quantized(quantization())
    assert is_quantized({**quantization(), "config_groups": {"group_0": {}}})


def test_layers_of_a_draft_have_the_names_of_its_checkpoint():
    assert stored_name("draft_model.model.layers.0.mlp.down_proj") == "model.layers.0.mlp.down_proj"
    assert (
        stored_name("model.draft_model.layers.0.mlp.down_proj")
        == "model.draft_model.layers.0.mlp.down_proj"
    )
