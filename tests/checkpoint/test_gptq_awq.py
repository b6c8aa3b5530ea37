"""Weights of GPTQ and AWQ checkpoints, as their tools write them, and damaged ones."""

import pytest
import torch

from rac_modifier.checkpoint.gptq_awq import Awq, Gptq
from rac_modifier.errors import RacError
from rac_modifier.formats.stored_weight import StoredWeight
from tests.checkpoint.gptq_awq_tensors import Rounded, awq, drawn, gptq, words

Tensors = dict[str, torch.Tensor]


def read_gptq(tensors, bits, group, symmetric, version=1, **more):
    """The weight of module "m" in a checkpoint with these entries."""
    entries = {
        "bits": bits,
        "group_size": group or -1,
        "sym": symmetric,
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
        **more,
    }
    return Gptq.of(entries).check(tensors, "m")


def read_awq(tensors: Tensors, group: int | None, symmetric: bool) -> StoredWeight:
    entries = {"bits": 4, "group_size": group or -1, "zero_point": not symmetric}
    return Awq.of(entries).check(tensors, "m")


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("rows", "columns", "group"), [(32, 64, 32), (64, 96, None), (8, 256, 128), (40, 64, 64)]
)
def test_a_gptq_weight_is_that_of_its_codes(rows, columns, group, symmetric, version, bits):
    weight = drawn(rows, columns, group, symmetric, bits)
    tensors = gptq(weight, version)
    before = {part: tensor.clone() for part, tensor in tensors.items()}
    refused = "asymmetric weights of 8 bits have no kernel" if bits == 8 else None
    if bits == 3 and version == 1:
        refused = "format gptq have two meanings.*save the model in format gptq_v2"
    if refused and not symmetric:
        with pytest.raises(RacError, match=rf"^m\.qzeros: .*{refused}"):
            read_gptq(tensors, weight.bits, group, symmetric, version)
        return
    actual = read_gptq(tensors, weight.bits, group, symmetric, version)
    assert (actual.rows, actual.columns, actual.bits) == (rows, columns, bits)
    assert (actual.density, actual.order) == (1.0, None)
    torch.testing.assert_close(actual.dequantized(torch.float32), weight.meant, rtol=0, atol=0)
    assert (actual.zeros is None) == symmetric
    if actual.zeros is not None:  # what the kernels keep: a code is a value and its code of zero
        assert torch.equal(actual.zeros.long(), weight.zeros)
        values = actual.dense().view(rows, weight.scale.shape[1], -1).long()
        assert torch.equal((values + weight.zeros[:, :, None]).view(rows, columns), weight.codes)
    assert all(torch.equal(tensors[part], tensor) for part, tensor in before.items())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("rows", "columns", "group"), [(32, 64, 32), (64, 96, None), (8, 256, 128), (40, 7, None)]
)
def test_an_awq_weight_is_that_of_its_codes(rows, columns, group, symmetric):
    weight = drawn(rows, columns, group, symmetric)
    actual = read_awq(awq(weight), group, symmetric)
    assert (actual.rows, actual.columns, actual.bits) == (rows, columns, 4)
    assert (actual.zeros is None) == symmetric
    torch.testing.assert_close(actual.dequantized(torch.float32), weight.meant, rtol=0, atol=0)


@pytest.mark.parametrize("bits", [4, 2])
def test_symmetric_weights_with_one_code_of_zero_in_both_ways(bits):
    weight = drawn(32, 64, 32, True, bits)
    half = torch.full((2, 32), 1 << (bits - 1))
    for zeros in (half, half - 1):
        tensors = {**gptq(weight), "qzeros": words(zeros, bits)}
        actual = read_gptq(tensors, weight.bits, 32, True, 2)
        torch.testing.assert_close(actual.dequantized(torch.float32), weight.meant, rtol=0, atol=0)
    half[1, 17] += 1
    with pytest.raises(RacError, match=r"^m\.qzeros: not \d everywhere, .* symmetric; restore"):
        read_gptq({**gptq(weight), "qzeros": words(half, bits)}, bits, 32, True, 2)


@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_reordered_columns(bits, index):
    """Groups are of neighbouring columns again; the order has the input of each column."""
    weight = drawn(32, 96, 32, False, bits)
    where = torch.randperm(96)
    tensors = gptq(weight, 2, where)
    tensors["g_idx"] = tensors["g_idx"].to(index)
    actual = read_gptq(tensors, weight.bits, 32, False, 2)
    order = actual.order
    assert order is not None
    assert order.dtype == torch.int64
    assert not torch.equal(order, torch.arange(96))
    on_disk = torch.empty(32, 96)
    on_disk[:, where] = weight.meant
    x = torch.randn(5, 96)
    torch.testing.assert_close(
        x[:, order] @ actual.dequantized(torch.float32).T, x @ on_disk.T, rtol=1e-4, atol=1e-4
    )
    del tensors["g_idx"]
    with pytest.raises(RacError, match=r"^m\.g_idx: missing"):
        read_gptq(tensors, bits, 32, False, 2, desc_act=True)
    # old writers have none where nothing is reordered
    assert read_gptq(tensors, weight.bits, 32, False, 2).order is None


def ints(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int32)


DAMAGE = [
    ("qweight", None, "missing"),
    ("qweight", torch.zeros(8, 32), "torch.float32 .* no matrix of int32 words"),
    ("qweight", ints(7, 32), "56 columns are no multiple of config.json's groups of 32"),
    ("scales", torch.full((2, 32), float("nan")), "torch.float32, or not finite"),
    ("g_idx", ints(63), r"torch.int32 \[63\] is not the group of each of 64"),
    ("g_idx", ints(64), "does not give 32 columns to each of 2 groups"),
]


@pytest.mark.parametrize(("part", "tensor", "message"), DAMAGE)
def test_damaged_parts_of_gptq(part, tensor, message):
    tensors = {**gptq(drawn(32, 64, 32, False)), part: tensor}
    with pytest.raises(RacError, match=f"^m.{part}: {message}"):
        read_gptq({k: v for k, v in tensors.items() if v is not None}, 4, 32, False)


@pytest.mark.parametrize(
    ("part", "tensor", "message"),
    [
        ("qweight", ints(63, 4), "63 columns are no multiple of config.json's groups of 32"),
        ("qzeros", ints(2, 3), r"shape \[2, 3\], but .* have \[2, 4\]"),
        ("g_idx", ints(64), "AWQ does not reorder columns"),
    ],
)
def test_damaged_parts_of_awq(part, tensor, message):
    with pytest.raises(RacError, match=f"^m.{part}: {message}"):
        read_awq({**awq(drawn(32, 64, 32, False)), part: tensor}, 32, False)


def test_what_contradicts_config_json():
    with pytest.raises(RacError, match=r"^m\.qzeros: not all 8, but .* zero_point: false; restore"):
        read_awq(awq(drawn(32, 64, 32, False)), 32, True)
    with pytest.raises(RacError, match=r"^m\.qweight: 2 words per row hold no whole number of 3-b"):
        read_gptq({"qweight": ints(2, 32)}, 3, None, True)


CHANGES = [
    lambda tensor: tensor.T.contiguous() if tensor.dim() > 1 else torch.zeros_like(tensor),
    lambda tensor: tensor[1:],
    lambda tensor: torch.cat([tensor, tensor], dim=-1),
    lambda tensor: tensor[None],
    lambda tensor: tensor.to(torch.uint8),
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("part", ["qweight", "qzeros", "scales", "g_idx"])
@pytest.mark.parametrize("bits", [4, 3])
def test_parts_of_another_shape_are_refused_by_name(bits, part, change):
    """Whatever one part is changed to, the message names a part."""
    weight = drawn(32, 192, 32, False, bits)
    tensors = gptq(weight, 2)
    tensors[part] = change(tensors[part])
    with pytest.raises(RacError, match=r"^m\.[a-z_]+: .*(copy|restore|save|damaged)"):
        read_gptq(tensors, weight.bits, 32, False, 2)


GPTQ = {"bits": 4, "group_size": 32, "sym": True}
AWQ = {"bits": 4, "group_size": 32, "zero_point": True}


@pytest.mark.parametrize(
    ("entries", "changes", "message"),
    [
        (Gptq, {"bits": 5}, r"bits is 5: Input .*; leave out --quantization rac, or"),
        (Gptq, {"group_size": 0}, "group_size is 0: .*a number of columns, or -1 for one"),
        (Gptq, {"dynamic": {"+:(": {}}}, "dynamic is .* is no regular"),
        (Gptq, {"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'"),
        (Awq, {"version": "gemv_fast"}, ".* is 'gemv_fast': only words of version gemm"),
        (Awq, {"backend": "llm-awq"}, "backend is 'llm-awq': only words of version gemm"),
    ],
)
def test_malformed_entries(entries, changes, message):
    sound = GPTQ if entries is Gptq else AWQ
    with pytest.raises(RacError, match=rf"^config.json: quantization_config.\w*{message}"):
        entries.of({**sound, **changes})


def test_entries_that_are_missing_and_those_of_other_writers():
    for name in GPTQ:
        with pytest.raises(RacError, match=rf"quantization_config\.{name} is missing"):
            Gptq.of({key: value for key, value in GPTQ.items() if key != name})
    old = Gptq.of({**GPTQ, "dynamic": None, "desc_act": None, "lm_head": None})
    assert (old.checkpoint_format, old.of_module("m")) == ("gptq", old)
    other = Awq.of({"w_bit": 4, "q_group_size": 64, "zero_point": True, "version": "GEMM"})
    assert (other.bits, other.group_size) == (4, 64)


def test_the_first_dynamic_rule_that_matches_counts():
    rules = {
        r"-:.*\.o$": {},
        r"+:.*\.down": {"bits": 3, "group_size": 96, "sym": False},
        r".*\.(q|down)$": {"bits": 2, "group_size": -1, "desc_act": True},
    }
    entries = Gptq.of({**GPTQ, "dynamic": rules})
    actual = {name: entries.of_module(name) for name in ("a.o", "a.down", "a.q")}
    assert {n: (e.bits, e.group_size, e.sym, e.desc_act) for n, e in actual.items()} == {
        "a.o": (4, 32, True, None),
        "a.down": (3, 96, False, None),
        "a.q": (2, -1, True, True),
    }


def linear_of(weight: Rounded) -> torch.nn.Linear:
    linear = torch.nn.Linear(weight.codes.shape[1], weight.codes.shape[0], bias=False)
    linear.weight.data = weight.meant
    return linear


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 96])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_gptq_weight_that_auto_round_packed(bits, group, symmetric):
    """Packed by another project's writer, format auto_gptq."""
    writer = pytest.importorskip("auto_round_extension.torch.qlinear_torch_zp")
    weight = drawn(64, 96, group, symmetric, bits)
    layer = writer.QuantLinear(bits, group, 96, 64, False, g_idx=True)
    zeros = 1 << (bits - 1) if symmetric else weight.zeros.float()
    layer.pack(linear_of(weight), weight.scale, zeros, None, "cpu")
    tensors = {part: getattr(layer, part) for part in ("qweight", "qzeros", "scales")}
    if bits == 8 and not symmetric:
        with pytest.raises(RacError, match="have no kernel"):
            read_gptq(tensors, bits, group, symmetric)
        return
    actual = read_gptq(tensors, bits, group, symmetric)
    assert actual.order is None
    torch.testing.assert_close(actual.dequantized(torch.float32), weight.meant, rtol=0, atol=0)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 96])
def test_an_awq_weight_that_auto_round_packed(group, symmetric):
    """Packed by another project's writer, format auto_awq."""
    writer = pytest.importorskip("auto_round.export.export_to_awq.utils")
    weight = drawn(64, 96, group, symmetric)
    zeros = 8 if symmetric else weight.zeros.T.contiguous()
    layer = writer.WQLinear_GEMM.from_linear(
        linear_of(weight), 4, group, scales=weight.scale.T.contiguous(), zeros=zeros, device="cpu"
    )
    tensors = {part: getattr(layer, part) for part in ("qweight", "qzeros", "scales")}
    actual = read_awq(tensors, group, symmetric)
    torch.testing.assert_close(actual.dequantized(torch.float32), weight.meant, rtol=0, atol=0)
