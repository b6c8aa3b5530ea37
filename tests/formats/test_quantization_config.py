"""What config.json says about quantization, and weights in int32 words."""

import pytest

from rac_modifier.errors import RacError
from rac_modifier.formats.encoding import Encoding
from rac_modifier.formats.quantization_config import (
    SparsityConfig,
    SparsityRecord,
    WeightScheme,
    int8_in_words,
    packed_format,
    weight_schemes,
    with_dense_mark,
    with_int8_activations,
    with_packed,
)

INT4 = {"weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}}
W8A8 = {
    "weights": {"num_bits": 8, "type": "int", "strategy": "channel"},
    "input_activations": {"num_bits": 8, "type": "int", "strategy": "token"},
    "format": "int-quantized",
}


def quantization(*groups: dict, format: str = "pack-quantized") -> dict:
    by_name = {f"group_{number}": group for number, group in enumerate(groups)}
    return {"format": format, "config_groups": by_name}


def test_schemes_in_their_order_each_once():
    activations_only = {"input_activations": {"num_bits": 8}, "weights": None}
    assert weight_schemes(quantization(INT4, W8A8, INT4, activations_only)) == (
        WeightScheme(Encoding("int", 4, 128), "group", "pack-quantized"),
        WeightScheme(Encoding("int", 8), "channel", "int-quantized", "int8 per token"),
    )
    four, eight = weight_schemes(quantization(INT4, W8A8))
    assert four.describe() == "int4 in groups of 128 (pack-quantized)"
    text = "int8 one scale per channel (int-quantized), activations int8 per token"
    assert eight.describe() == text


WEIGHTS = INT4["weights"]


@pytest.mark.parametrize(
    "groups",
    [
        {"g": {"weights": 4}},
        ["W4A16"],
        {"g": {"weights": {**WEIGHTS, "num_bits": 1e30}}},
        {"g": {"weights": {**WEIGHTS, "group_size": 2**62}}},
    ],
)
def test_malformed_groups(groups):
    with pytest.raises(
        RacError, match=r"^config\.json: quantization_config\.config_groups.*; restore"
    ):
        weight_schemes({"config_groups": groups})


def test_patterns_that_match_without_end():
    """vLLM and transformers would match them against each module."""
    with pytest.raises(RacError, match=r"targets of config group 'group_0': .*too long to match"):
        weight_schemes(quantization({**INT4, "targets": ["re:(a+)+$"]}))
    with pytest.raises(RacError, match=r"ignore of quantization_config: .*too long to match"):
        weight_schemes({**quantization(INT4), "ignore": ["re:(a|a)*$"]})


def test_int8_in_words_beside_plain_int8_is_refused():
    words = {"weights": {"num_bits": 8}}
    floats = {"weights": {"num_bits": 8, "type": "float"}}
    assert int8_in_words(weight_schemes(quantization(words)))
    assert not int8_in_words(weight_schemes(quantization(INT4, W8A8, floats)))
    with pytest.raises(
        RacError, match="int-quantized and pack-quantized cannot be stored sparse together"
    ):
        int8_in_words(weight_schemes(quantization(words, W8A8)))


INT8 = {
    "config_groups": {"group_0": {"weights": {"num_bits": 8}}},
    "format": "int-quantized",
    "global_compression_ratio": None,
}


def test_modules_with_activations_of_8_bits():
    pruned = with_packed({"model_type": "x"}, "sparse-bitmask", {"a.b": "2:4"}, [])
    for config in (pruned, {"model_type": "x", "quantization_config": INT8}):
        written = with_int8_activations(config, ["c", "a.b"])
        assert SparsityRecord.of(written).int8_activations == ("a.b", "c")
        assert SparsityRecord.of(written).modules == SparsityRecord.of(config).modules
        assert SparsityRecord.of(with_int8_activations(written, ["d"])).int8_activations == ("d",)
        assert SparsityRecord.of(with_int8_activations(written, [])).int8_activations == ()
    assert written["rac_sparsity"] == {
        "storage": "dense",
        "modules": {},
        "int8_activations": ["a.b", "c"],
    }


@pytest.mark.parametrize("format", ["sparse-24-bitmask", "sparse-bitmask"])
def test_what_packing_writes_is_read_back(format):
    written = with_packed({"quantization_config": INT8}, format, {"a.b": "2:4"}, ["lm_head"])
    assert packed_format(written) == format
    sparsity = SparsityConfig.of(written["quantization_config"])
    assert sparsity is not None
    assert sparsity.ignore == ("lm_head",)
    assert SparsityRecord.of(written).modules == {"a.b": "2:4"}
    assert SparsityRecord.of(written).storage == "packed"
    assert written["quantization_config"]["config_groups"] == INT8["config_groups"]
    dense = with_dense_mark(written, {"a.b": "2:4"})
    assert packed_format(dense) is None
    assert SparsityRecord.of(dense).storage == "dense"
    assert dense["quantization_config"] == {**INT8, "quant_method": "compressed-tensors"}


def test_entries_of_older_versions():
    sparsity = {"format": "sparse-bitmask", "targets": None, "registry_requires_subclass": False}
    for version in ({}, {"version": 1}):
        actual = SparsityConfig.of({"sparsity_config": {**sparsity, **version}})
        assert actual is not None
        assert (actual.targets, actual.ignore) == (("Linear",), ())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "new"}, "format is 'new': Input should be 'sparse-24-bitmask' or"),
        ({"targets": "Linear"}, "targets is 'Linear': .*write a list of names or .*; save the"),
        ({"ignore": ["re:("]}, r"ignore is .*: ignore: 're:\(' is no regular expression"),
        ({"version": 2}, "version is 2: .*; a newer version wrote it: pip install -U rac-mod"),
    ],
)
def test_a_malformed_sparsity_config(changes, message):
    with pytest.raises(RacError, match=rf"^config\.json: sparsity_config\.{message}"):
        SparsityConfig.of({"sparsity_config": {"format": "sparse-bitmask", **changes}})
    with pytest.raises(RacError, match=r"sparsity_config is \[1\]: .*; save the model"):
        SparsityConfig.of({"sparsity_config": [1]})


@pytest.mark.parametrize("record", ["dense", {"modules": {"a": 5}}, {"storage": "zip"}])
def test_a_malformed_record(record):
    with pytest.raises(RacError, match=r"config\.json: rac_sparsity.* is .*; save the model again"):
        SparsityRecord.of({"rac_sparsity": record})
