"""The two entries of config.json about sparsity: read, refused, written."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rac_modifier.checkpoint.sparsity_config import (
    SparsityConfig,
    SparsityRecord,
    ignored_modules,
    packed_format,
    recorded_structures,
    with_dense_mark,
    with_int8_activations,
    with_packed,
    without_sparsity,
)
from rac_modifier.errors import RacError

INT8 = {"config_groups": {"group_0": {"weights": {"num_bits": 8}}}, "format": "int-quantized"}


def quantization(**sparsity: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "sparsity_config": {"format": "sparse-bitmask", **sparsity},
    }


def test_what_packing_writes() -> None:
    """The file's very layout: other readers have it."""
    assert with_packed(
        {"model_type": "x"}, "sparse-24-bitmask", {"a.b": "2:4"}, 0.49999996, ["lm_head", "a.c"]
    ) == {
        "model_type": "x",
        "quantization_config": {
            "format": "dense",
            "quant_method": "compressed-tensors",
            "sparsity_config": {
                "format": "sparse-24-bitmask",
                "sparsity_structure": "2:4",
                "global_sparsity": 0.5,
                "targets": ["Linear"],
                "ignore": ["a.c", "lm_head"],
            },
        },
        "rac_sparsity": {"storage": "packed", "modules": {"a.b": "2:4"}},
    }


def test_modules_with_activations_of_8_bits() -> None:
    """Of a pruned model beside its modules; of one that is quantized alone they come and go with the entry."""
    pruned = with_packed({"model_type": "x"}, "sparse-bitmask", {"a.b": "2:4"}, 0.5, [])
    for config in (pruned, {"model_type": "x", "quantization_config": INT8}):
        written = with_int8_activations(config, ["c", "a.b"])
        assert SparsityRecord.of(written).int8_activations == ("a.b", "c")
        assert SparsityRecord.of(written).modules == SparsityRecord.of(config).modules
        assert SparsityRecord.of(with_int8_activations(written, ["d"])).int8_activations == ("d",)
        assert with_int8_activations(written, []) == config
        assert with_int8_activations(config, []) == config
    assert written["rac_sparsity"] == {
        "storage": "dense",
        "modules": {},
        "int8_activations": ["a.b", "c"],
    }


@pytest.mark.parametrize("format", ["sparse-24-bitmask", "sparse-bitmask"])
def test_what_packing_writes_is_read_back(format: str) -> None:
    written = with_packed({"quantization_config": INT8}, format, {"a.b": "2:4"}, 0.5, ["lm_head"])
    assert packed_format(written) == format
    assert ignored_modules(written) == {"lm_head"}
    assert recorded_structures(written) == {"a.b": "2:4"}
    assert SparsityRecord.of(written).storage == "packed"
    assert written["quantization_config"]["config_groups"] == INT8["config_groups"]
    dense = with_dense_mark(written, {"a.b": "2:4"})
    assert packed_format(dense) is None
    assert SparsityRecord.of(dense).storage == "dense"
    assert dense["quantization_config"] == {**INT8, "quant_method": "compressed-tensors"}


def test_a_config_is_copied_not_changed() -> None:
    config: dict[str, Any] = {"quantization_config": {**INT8, "quant_method": "compressed-tensors"}}
    before = repr(config)
    with_dense_mark(with_packed(config, "sparse-bitmask", {"a": "2:4"}, 0.5, []), {"a": "2:4"})
    assert repr(config) == before


@pytest.mark.parametrize(
    ("kept", "expected"),
    [
        ({}, None),
        ({"format": "dense"}, None),
        (INT8, {"quant_method": "compressed-tensors", **INT8}),
        (
            {"kv_cache_scheme": {"num_bits": 8}},
            {"quant_method": "compressed-tensors", "kv_cache_scheme": {"num_bits": 8}},
        ),
    ],
)
def test_without_sparsity_quantization_is_left(
    kept: dict[str, Any], expected: dict[str, Any] | None
) -> None:
    assert without_sparsity({**quantization(), **kept}) == expected


@pytest.mark.parametrize("before", ["gptq", {"quant_method": "gptq", "bits": 4}])
def test_a_model_of_another_method_is_not_packed(before: object) -> None:
    with pytest.raises(RacError, match="quantized by 'gptq'; only compressed-tensors"):
        with_packed({"quantization_config": before}, "sparse-bitmask", {"a": "2:4"}, 0.5, [])


NOT_PACKED = [
    None,
    [],
    "compressed-tensors",
    {"quant_method": "gptq", "bits": 4},
    {"quant_method": "fp8", "sparsity_config": {"format": "sparse-bitmask"}},
    {"quant_method": "compressed-tensors", "config_groups": {}},
    {"quant_method": "compressed-tensors", "sparsity_config": {}},
    {"quant_method": "compressed-tensors", "sparsity_config": {"format": "dense"}},
]


@pytest.mark.parametrize("other", NOT_PACKED, ids=str)
def test_what_is_not_packed(other: object) -> None:
    assert SparsityConfig.of(other) is None
    assert packed_format({"quantization_config": other}) is None


def test_defaults_and_entries_of_older_versions() -> None:
    found = SparsityConfig.of(
        quantization(targets=None, ignore=None, registry_requires_subclass=False)
    )
    assert found is not None
    assert (found.targets, found.ignore, found.sparsity_structure) == (
        ("Linear",),
        (),
        "unstructured",
    )


@pytest.mark.parametrize(
    ("sparsity", "message"),
    [
        ([1], r"config\.json: sparsity_config is \[1\], not an object; save the model again"),
        (
            {"format": "sparse-new"},
            "sparsity_config.format is 'sparse-new', which cannot be read; known are sparse-24",
        ),
        ({"format": ["a"]}, "sparsity_config.format is"),
        ({"targets": ["Linear"]}, "sparsity_config.format is None"),
        (
            {"format": "sparse-bitmask", "targets": "Linear"},
            "targets is 'Linear', not a list of module names",
        ),
        (
            {"format": "sparse-bitmask", "ignore": [1]},
            r"ignore is \[1\], not a list of module names",
        ),
        (
            {"format": "sparse-bitmask", "ignore": ["re:("]},
            r"ignore has a name: 're:\(' is no regular expression",
        ),
        (
            {"format": "sparse-bitmask", "targets": ["re:(a+)+$"]},
            r"targets has a name: .* could take too long to match",
        ),
    ],
)
def test_a_malformed_sparsity_config(sparsity: object, message: str) -> None:
    with pytest.raises(RacError, match=message):
        SparsityConfig.of({"sparsity_config": sparsity})


@pytest.mark.parametrize("config", [{}, {"rac_sparsity": None}, {"rac_sparsity": {}}])
def test_nothing_recorded(config: dict[str, Any]) -> None:
    assert recorded_structures(config) == {}


@pytest.mark.parametrize(
    "record", ["dense", {"modules": ["a"]}, {"modules": {"a": 5}}, {"storage": "zip"}]
)
def test_a_malformed_record(record: object) -> None:
    with pytest.raises(RacError, match=r"config\.json: rac_sparsity.* is .*; save the model again"):
        SparsityRecord.of({"rac_sparsity": record})


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from(["compressed-tensors", "sparse-bitmask", "re:(", ""]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["quant_method", "sparsity_config", "format", "targets", "ignore", "modules", "x"]
            ),
            inner,
        )
    ),
    max_leaves=8,
)


@given(anything)
def test_whatever_is_in_the_file_is_read_or_refused(value: object) -> None:
    for read in (SparsityConfig.of, lambda v: SparsityRecord.of({"rac_sparsity": v})):
        with contextlib.suppress(RacError):
            read(value)


@pytest.mark.parametrize(
    ("version", "says"),
    [
        (
            2,
            r"version is 2, and this rac-modifier reads versions up to 1: a newer one wrote it; pip install -U rac-modifier$",
        ),
        (0, "version is 0"),
        ("new", "version is 'new'"),
    ],
)
def test_another_version_of_the_layouts_is_refused(version: object, says: str) -> None:
    entry = {
        "quant_method": "compressed-tensors",
        "sparsity_config": {"format": "sparse-bitmask", "version": version},
    }
    with pytest.raises(RacError, match=says):
        SparsityConfig.of(entry)


def test_the_first_version_is_not_written() -> None:
    """Checkpoints that were written before there were versions have none."""
    written = with_packed({}, "sparse-bitmask", {"a": "unstructured"}, 0.5, [])[
        "quantization_config"
    ]["sparsity_config"]
    assert "version" not in written
    found = SparsityConfig.of({"sparsity_config": {**written, "version": 1}})
    assert found is not None
    assert found.version == 1
