"""Which checkpoints are ours, which of their layers are compressed, and how readers read them."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.vllm_plugin.vllm_fixtures import needs_vllm

needs_vllm()


from rac_modifier.checkpoint.formats import FORMATS
from rac_modifier.errors import RacError
from rac_modifier.formats.encoding import Encoding
from rac_modifier.formats.quantization_config import with_packed
from rac_modifier.vllm_plugin.layouts import (
    CodesLayout,
    GptqAwqLayout,
    Layout,
    PackedLayout,
    is_packed,
)
from rac_modifier.vllm_plugin.readers import CodesReader
from tests.checkpoint.gptq_awq_tensors import drawn, gptq
from tests.vllm_plugin.layer_kinds import FORMS, K
from tests.vllm_plugin.stored_forms import (
    gptq_config,
    quantization,
    quantized_sparse,
)

INPUTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
LINEAR = torch.nn.Linear(96, 64)


def packed(**sparsity: Any) -> dict[str, Any]:
    sparsity = {"format": "sparse-bitmask", **sparsity}
    return {"quant_method": "compressed-tensors", "sparsity_config": sparsity}


def group(targets, bits=4, inputs=None, **changes):
    """A config group of compressed-tensors."""
    first = quantization(bits=bits)["config_groups"]["group_0"]
    first["weights"] |= changes
    return {**first, "targets": targets, "input_activations": inputs}


@pytest.mark.parametrize("format", ["sparse-24-bitmask", "sparse-bitmask"])
def test_what_packing_writes_is_packed(format):
    written = with_packed({}, format, {"a.b": "2:4"}, ["lm_head"])["quantization_config"]
    assert is_packed(written)
    layout = PackedLayout(written)
    assert layout.experts_reader(EXPERTS, "a.experts") is layout.packed
    assert (layout.targets, layout.ignore) == (("Linear",), ("lm_head",))
    assert layout.packed.format.name == format
    assert layout.inner is None


def test_names_patterns_and_classes():
    layout = PackedLayout(packed(targets=["Linear"], ignore=["lm_head", "re:.*gate$"]))
    names = ("model.layers.0.mlp.up_proj", "lm_head", "model.mlp.gate", "model.mlp.gate_proj")
    assert [layout.holds(LINEAR, name) for name in names] == [True, False, False, True]
    assert layout.reader(LINEAR, ["lm_head"]) is None
    assert layout.reader(LINEAR, ["a.q", "lm_head"]) is layout.packed  # one of them is
    named = PackedLayout(packed(targets=["a.b", "re:c"]))
    assert [name for name in ("a.b", "a.bc", "c.d", "x.c") if named.holds(LINEAR, name)] == [
        "a.b",
        "c.d",
    ]


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


EXPERTS = SimpleNamespace(
    ckpt_gate_proj_name="w1",
    ckpt_up_proj_name="w3",
    ckpt_down_proj_name="w2",
    global_num_experts=2,
)


def test_what_reads_each_layer_of_codes():
    groups = {
        "a": group(["re:.*column", "re:.*row"]),
        "b": group(["a.q", "a.v"], bits=3, symmetric=False, strategy="channel", group_size=None),
        "c": group(["a.gate", "a.up"], bits=8),
        "d": group(["re:.*experts.*w1"], bits=2),
        "e": group(["re:.*experts.*w3"]),
    }
    layout = CodesLayout(quantization(config_groups=groups, ignore=["a.row"]))
    assert layout.reader(LINEAR, ["a.row"]) is None
    assert layout.reader(LINEAR, ["a.gate", "a.up"]) == "its weights are int8"
    column = layout.reader(LINEAR, ["a.column"])
    assert isinstance(column, CodesReader)
    assert column.schemes["a.column"].encoding == Encoding("int", 4, 32)
    qkv = layout.reader(LINEAR, ["a.q", "a.k", "a.v"])
    assert isinstance(qkv, CodesReader)
    assert qkv.schemes["a.k"] is None  # in floats
    assert qkv.schemes["a.q"].encoding.bits == 3
    experts = layout.experts_reader(EXPERTS, "a.experts")
    assert isinstance(experts, CodesReader)
    schemes = {name: scheme and scheme.encoding.bits for name, scheme in experts.schemes.items()}
    assert schemes == {
        f"a.experts.{number}.{name}": bits
        for number in range(2)
        for name, bits in (("w1", 2), ("w3", 4), ("w2", None))
    }
    assert layout.experts_reader(EXPERTS, "a.others") is None


@pytest.mark.parametrize(("bits", "inputs", "read"), [(8, True, True), (3, False, False)])
def test_a_quantized_head(bits, inputs, read):
    """A head alone is enough for the option, int8 too, which linear layers have no kernel for."""
    head = group(["re:.*lm_head"], bits, INPUTS if inputs else None)
    groups = {"g": group(["Linear"]), "h": head}
    layout = CodesLayout(quantization(config_groups=groups, ignore=[]))
    assert isinstance(layout.vocabulary_reader(LINEAR, "lm_head"), CodesReader) == read
    if read:
        CodesLayout(quantization(config_groups={"h": head}, ignore=[]))


def reader_of(form: str):
    """The reader of a layer "m"."""
    layout = FORMS[form].config().layout
    assert isinstance(layout, Layout)
    return layout.reader(torch.nn.Linear(K, 64), ["m"])


@pytest.mark.parametrize(
    ("form", "change", "message"),
    [
        ("2:4", {"weight": torch.ones(64, K)}, "weight: stored both dense and packed"),
        ("gptq", {"weight": torch.ones(K)}, r"weight: shape \[96\] is not that of a matrix"),
        ("2:4 int8", {"weight_scale": None}, "weight_scale: missing"),
        ("2:4 int8", {"weight_zero_point": torch.zeros(64, 1)}, "weight_zero_point: .*symmetric"),
        ("int4", {"weight": torch.ones(64, K)}, "weight: not quantized, but .* says int4"),
        ("int4", {"weight_zero_point": torch.zeros(8, 3)}, "weight_zero_point: must not be there"),
        ("gptq", {"weight": torch.ones(64, K)}, r"weight: torch.float32 next to .*'qweight'"),
        ("awq", {"g_idx": torch.zeros(K)}, "g_idx: AWQ does not reorder columns"),
    ],
)
def test_what_is_damaged_is_named(form, change, message):
    weight = torch.randn(64, K)
    weight.view(-1, 2)[:, 0] = 0
    tensors = {**FORMS[form].store(weight)[0], **change}
    with pytest.raises(RacError, match=f"^m.{message}"):
        reader_of(form).read({k: v for k, v in tensors.items() if v is not None}, "m")


def test_scales_per_block_have_no_sparse_kernel():
    """Packed by an older version."""
    config = quantized_sparse("sparse-bitmask", "fp8", [])
    weights = config["config_groups"]["group_0"]["weights"]
    weights |= {"strategy": "block", "block_structure": [128, 128]}
    tensors = FORMATS["sparse-bitmask"].compress(torch.eye(160, K).to(torch.float8_e4m3fn), "m")
    reader = PackedLayout(config).packed
    with pytest.raises(RacError, match=r"^m\.weight_scale: its scales are per block .*rac unpack"):
        reader.read({**tensors, "weight_scale": torch.ones(2, 1)}, "m")
    with pytest.raises(RacError, match=r"^m\.weight_scale: .* is damaged"):
        reader.read({**tensors, "weight_scale": torch.ones(2)}, "m")


def test_codes_in_floats_where_config_json_quantizes_them():
    layout = CodesLayout(quantization(config_groups={"g": group(["a.q"])}))
    reader = layout.reader(torch.nn.Linear(K, 64), ["a.q", "a.k"])
    weight = torch.randn(64, K)
    assert reader.read({"weight": weight}, "a.k") is weight
    with pytest.raises(RacError, match=r"a\.k\.weight: torch.int8 next to"):
        reader.read({"weight": weight.to(torch.int8)}, "a.k")


def test_the_bits_of_a_module_are_those_of_its_rule():
    reader = GptqAwqLayout(gptq_config(dynamic={r"+:a\.down": {"bits": 3}})).format
    weight = drawn(64, 96, 32, True, 3)
    result = reader.read(gptq(weight), "a.down")
    torch.testing.assert_close(result.dequantized(torch.float32), weight.meant, rtol=0, atol=0)
    with pytest.raises(RacError, match=r"^a\.up\."):
        reader.read(gptq(weight), "a.up")


@pytest.mark.parametrize(("location", "refused"), [("input", True), ("weight_input", False)])
def test_packed_weights_with_rotated_activations_are_refused(location, refused):
    apply = [{"location": location, "targets": ["Linear"]}]
    rotation = {"config_groups": {"r": {"type": "hadamard", "apply": apply}}}
    config = packed() | {"transform_config": rotation}
    if refused:
        with pytest.raises(RacError, match=r"has rotations of activations.*rac unpack"):
            PackedLayout(config)
    else:
        PackedLayout(config)
