"""Which checkpoints are ours, which of their layers are compressed, and what reads them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.vllm_plugin.vllm_fixtures import needs_vllm

needs_vllm()

from rac_modifier.checkpoint.quantization_config import (  # noqa: E402
    SparsityRecord,
    with_dense_mark,
    with_packed,
)
from rac_modifier.errors import RacError  # noqa: E402
from rac_modifier.vllm_plugin.layouts import (  # noqa: E402
    CodesLayout,
    PackedLayout,
    PrunedLayout,
    WordsLayout,
    is_packed,
)
from rac_modifier.vllm_plugin.readers import CodesReader, why_not_codes  # noqa: E402
from tests.vllm_plugin.stored_forms import gptq_config, quantization  # noqa: E402

INPUTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
LINEAR = torch.nn.Linear(96, 64)


def packed(method: str = "compressed-tensors", **sparsity: Any) -> dict[str, Any]:
    return {"quant_method": method, "sparsity_config": {"format": "sparse-bitmask", **sparsity}}


def group(
    targets: list[str], bits: int = 4, inputs: dict[str, object] | None = None, **changes: object
) -> dict[str, Any]:
    """A config group of compressed-tensors."""
    first = quantization(bits=bits)["config_groups"]["group_0"]
    first["weights"] |= changes
    return {**first, "targets": targets, "input_activations": inputs}


@pytest.mark.parametrize(
    ("format", "method"), [("sparse-24-bitmask", "compressed-tensors"), ("sparse-bitmask", "rac")]
)
def test_what_packing_writes_is_packed(format, method):
    written = with_packed({}, format, {"a.b": "2:4"}, ["lm_head"])["quantization_config"]
    written["quant_method"] = method
    assert is_packed(written)
    layout = PackedLayout(written)
    assert layout.experts_reader() is layout
    assert (layout.targets, layout.ignore) == (("Linear",), ("lm_head",))
    assert layout.format == format
    assert layout.inner is None


def test_names_patterns_and_classes():
    layout = PackedLayout(packed(targets=["Linear"], ignore=["lm_head", "re:.*gate$"]))
    names = ("model.layers.0.mlp.up_proj", "lm_head", "model.mlp.gate", "model.mlp.gate_proj")
    assert [layout.holds(name) for name in names] == [True, False, False, True]
    assert layout.reader(LINEAR, ["lm_head"]) is None
    assert layout.reader(LINEAR, ["a.q", "lm_head"]) is layout  # one of them is
    named = PackedLayout(packed(targets=["a.b", "re:c"]))
    assert [name for name in ("a.b", "a.bc", "c.d", "x.c") if named.holds(name)] == ["a.b", "c.d"]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"targets": "Linear"}, r"targets is .*: Input should be a valid tuple"),
        ({"ignore": [1]}, r"ignore\.0 is 1: Input should be a valid string"),
        ({"ignore": ["re:("]}, r"ignore is .*: has a name: 're:\(' is no regular expression"),
        (None, r"no sparsity_config; restore"),
    ],
)
def test_malformed_entries(entry, message):
    config = {"quant_method": "rac"} if entry is None else packed(**entry)
    with pytest.raises(RacError, match=message):
        PackedLayout(config)


def test_pruned_weights_that_are_stored_dense():
    written = with_dense_mark({}, {"model.a": "2:4", "model.b": "unstructured"})
    layout = PrunedLayout(SparsityRecord.of(written))
    assert layout.reader(LINEAR, ["model.a"]) is layout
    assert layout.reader(LINEAR, ["model.c"]) is None
    assert layout.experts_reader() is None
    with pytest.raises(RacError, match="leave out --quantization rac"):
        PrunedLayout(SparsityRecord())
    with pytest.raises(RacError, match="experts of this format have no kernel; leave it out"):
        WordsLayout(gptq_config()).experts_reader()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"config_groups": {"g": group(["Linear"], bits=8)}}, "its weights are int8"),
        ({"format": "mixed-precision"}, "its format is mixed-precision, not pack-quantized"),
        ({"transform_config": {"config_groups": {}}}, "its inputs or outputs are transformed"),
        ({"config_groups": {}}, "it quantizes nothing"),
    ],
)
def test_a_checkpoint_on_which_the_option_has_no_effect(changes, reason):
    with pytest.raises(RacError, match=f"^--quantization rac: .* since {reason}; leave it out"):
        CodesLayout(quantization(**changes))


def test_what_reads_each_layer_of_codes():
    groups = {
        "a": group(["re:.*column", "re:.*row"]),
        "b": group(["a.q", "a.v"], bits=3, symmetric=False, strategy="channel", group_size=None),
        "c": group(["a.gate", "a.up"], bits=8),
    }
    layout = CodesLayout(quantization(config_groups=groups, ignore=["a.row"]))
    assert layout.reader(LINEAR, ["a.row"]) is None
    assert layout.reader(LINEAR, ["a.gate", "a.up"]) == "its weights are int8"
    column = layout.reader(LINEAR, ["a.column"])
    assert isinstance(column, CodesReader)
    assert (column.weights["a.column"].num_bits, column.weights["a.column"].group_size) == (4, 32)
    qkv = layout.reader(LINEAR, ["a.q", "a.k", "a.v"])
    assert isinstance(qkv, CodesReader)
    assert qkv.weights["a.k"] is None  # in floats
    assert qkv.weights["a.q"].num_bits == 3
    assert layout.experts_reader() == "dense experts of few bits have no kernel"


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
def test_a_quantized_head(changes, reason):
    """A head alone is enough for the option, int8 too, which linear layers have no kernel for."""
    groups = {"g": group(["Linear"]), "h": group(["re:.*lm_head"], **changes)}
    layout = CodesLayout(quantization(config_groups=groups, ignore=[]))
    scheme = layout.inner.get_scheme_dict(LINEAR, "lm_head")
    assert why_not_codes(scheme, "pack-quantized", vocabulary=True) == reason
    reader = layout.vocabulary_reader(LINEAR, "lm_head")
    assert isinstance(reader, CodesReader) == (reason is None)
    if reason is None:
        CodesLayout(quantization(config_groups={"h": groups["h"]}, ignore=[]))
