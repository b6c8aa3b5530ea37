"""Weights of GPTQ and AWQ checkpoints: read as those write them, and refused where parts do not fit."""

from __future__ import annotations

import pytest
import torch

from rac_modifier.checkpoint.gptq_awq import AwqEntries, GptqEntries, check_awq, check_gptq
from rac_modifier.checkpoint.stored_weight import StoredWeight
from rac_modifier.errors import RacError
from tests.checkpoint.gptq_awq_tensors import Rounded, awq, drawn, gptq, minus_one, words

Tensors = dict[str, torch.Tensor]


def read_gptq(
    tensors: Tensors,
    bits: int,
    group: int | None,
    symmetric: bool,
    version: int = 1,
    **more: object,
) -> tuple[StoredWeight, torch.Tensor | None]:
    """The weight of module "m" in a checkpoint with these entries."""
    entries = {
        "bits": bits,
        "group_size": group or -1,
        "sym": symmetric,
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
        **more,
    }
    return check_gptq(tensors, "m", GptqEntries.of(entries))


def read(
    tensors: Tensors, weight: Rounded, group: int | None, symmetric: bool, version: int
) -> tuple[StoredWeight, torch.Tensor | None]:
    return read_gptq(tensors, weight.bits, group, symmetric, version)


def read_awq(tensors: Tensors, group: int | None, symmetric: bool) -> StoredWeight:
    entries = {"bits": 4, "group_size": group or -1, "zero_point": not symmetric}
    return check_awq(tensors, "m", AwqEntries.of(entries))


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
    if bits == 3 and version == 1 and not symmetric:
        with pytest.raises(
            RacError,
            match=r"^m\.qzeros: .* format gptq have two meanings.*save the model in format gptq_v2",
        ):
            read(tensors, weight, group, symmetric, version)
        return
    if bits == 8 and not symmetric:
        with pytest.raises(
            RacError, match=r"^m\.qzeros: asymmetric weights of 8 bits have no kernel"
        ):
            read(tensors, weight, group, symmetric, version)
        return
    found, order = read(tensors, weight, group, symmetric, version)
    assert (found.rows, found.columns, found.bits, found.density, order) == (
        rows,
        columns,
        bits,
        1.0,
        None,
    )
    torch.testing.assert_close(found.dequantized(torch.float32), weight.meant, rtol=0, atol=0)
    assert (found.zeros is None) == symmetric
    if found.zeros is not None:  # what the kernels keep: a code is a value and its code of zero
        assert torch.equal(found.zeros.long(), weight.zeros)
        values = found.dense().view(rows, weight.scale.shape[1], -1).long()
        assert torch.equal((values + weight.zeros[:, :, None]).view(rows, columns), weight.codes)
    assert all(
        torch.equal(tensors[part], tensor) for part, tensor in before.items()
    )  # they are still mapped from a file


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("rows", "columns", "group"), [(32, 64, 32), (64, 96, None), (8, 256, 128), (40, 7, None)]
)
def test_an_awq_weight_is_that_of_its_codes(rows, columns, group, symmetric):
    weight = drawn(rows, columns, group, symmetric, least=0)
    found = read_awq(awq(weight), group, symmetric)
    assert (found.rows, found.columns, found.bits) == (rows, columns, 4)
    assert (found.zeros is None) == symmetric
    torch.testing.assert_close(found.dequantized(torch.float32), weight.meant, rtol=0, atol=0)


def test_the_order_of_codes_in_a_word():
    """GPTQ: eight columns of a row, the first in the lowest bits. AWQ: eight rows of a column, as its kernel reads them."""
    scales = torch.ones(1, 8)
    middle = torch.full((1, 1), -0x77777778, dtype=torch.int32)  # 0x88888888
    along_columns = {
        "qweight": torch.tensor([[0x76543210] * 8], dtype=torch.int32),
        "qzeros": middle,
        "scales": scales,
    }
    found, _ = read_gptq(along_columns, 4, None, True, 2)
    assert found.dense().tolist() == [[-8, -7, -6, -5, -4, -3, -2, -1]] * 8
    along_rows = {
        "qweight": torch.tensor([[0x75316420]], dtype=torch.int32),
        "qzeros": middle,
        "scales": scales,
    }
    found = read_awq(along_rows, None, True)
    assert found.dense().tolist() == [[-8], [-7], [-6], [-5], [-4], [-3], [-2], [-1]]


@pytest.mark.parametrize("bits", [4, 2])
def test_codes_of_zero_of_0_in_format_1(bits):
    """They borrow from their neighbours when one is subtracted from each; adding gives the borrowed back."""
    weight = drawn(64, 64, 32, False, bits, least=0)
    assert bool((weight.zeros == 0).any())
    assert not torch.equal(gptq(weight)["qzeros"], words((weight.zeros.T - 1) % (1 << bits), bits))
    torch.testing.assert_close(
        read(gptq(weight), weight, 32, False, 1)[0].dequantized(torch.float32),
        weight.meant,
        rtol=0,
        atol=0,
    )


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_symmetric_weights_in_all_ways_in_which_zero_is_stored(bits):
    weight = drawn(32, 64, 32, True, bits)
    half = torch.full((2, 32), 1 << (bits - 1))
    for zeros in (words(half, bits), words(half - 1, bits), minus_one(half, bits)):
        for version in (1, 2):
            found, _ = read({**gptq(weight), "qzeros": zeros}, weight, 32, True, version)
            assert found.zeros is None
            torch.testing.assert_close(
                found.dequantized(torch.float32), weight.meant, rtol=0, atol=0
            )
    other = half.clone()
    other[1, 17] += 1
    with pytest.raises(
        RacError,
        match=rf"^m\.qzeros: not {1 << (bits - 1)} everywhere, .* symmetric \(sym\); restore",
    ):
        read({**gptq(weight), "qzeros": words(other, bits)}, weight, 32, True, 2)


@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_reordered_columns(bits, index):
    """Groups are of neighbouring columns again, and the order says which input each column multiplies."""
    weight = drawn(32, 96, 32, False, bits)
    where = torch.randperm(96)
    tensors = gptq(weight, 2, where)
    tensors["g_idx"] = tensors["g_idx"].to(index)
    found, order = read(tensors, weight, 32, False, 2)
    assert order is not None
    assert order.dtype == torch.int64
    assert not torch.equal(order, torch.arange(96))
    on_disk = torch.empty(32, 96)
    on_disk[:, where] = weight.meant
    x = torch.randn(5, 96)
    torch.testing.assert_close(
        x[:, order] @ found.dequantized(torch.float32).T, x @ on_disk.T, rtol=1e-4, atol=1e-4
    )
    del tensors["g_idx"]
    with pytest.raises(RacError, match=r"^m\.g_idx: missing"):
        read_gptq(tensors, bits, 32, False, 2, desc_act=True)
    assert (
        read(tensors, weight, 32, False, 2)[1] is None
    )  # old writers have none where nothing is reordered


GPTQ_DAMAGE = [
    ({"qweight": None}, "qweight: missing"),
    ({"qzeros": None}, "qzeros: missing"),
    ({"scales": None}, "scales: missing"),
    ({"qweight": torch.zeros(8, 32)}, "qweight: torch.float32 .* no matrix of int32 words"),
    ({"qweight": torch.zeros(8, dtype=torch.int32)}, r"qweight: torch.int32 \[8\] is no matrix"),
    (
        {"qweight": torch.zeros(0, 32, dtype=torch.int32)},
        r"qweight: torch.int32 \[0, 32\] is no matrix",
    ),
    (
        {"qweight": torch.zeros(7, 32, dtype=torch.int32)},
        "qweight: 56 columns are no multiple of config.json's groups of 32",
    ),
    (
        {"qweight": torch.zeros(12, 32, dtype=torch.int32)},
        r"scales: shape \[2, 32\], but .* groups have \[3, 32\]",
    ),
    (
        {"qweight": torch.zeros(8, 40, dtype=torch.int32)},
        r"scales: shape \[2, 32\], but .* have \[2, 40\]",
    ),
    ({"scales": torch.ones(2, 32, dtype=torch.int32)}, "scales: torch.int32, or not finite"),
    ({"scales": torch.full((2, 32), float("inf"))}, "scales: torch.float32, or not finite"),
    ({"scales": torch.full((2, 32), float("nan")).half()}, "scales: torch.float16, or not finite"),
    ({"scales": torch.ones(32, 2)}, r"scales: shape \[32, 2\]"),
    (
        {"qzeros": torch.zeros(2, 3, dtype=torch.int32)},
        r"qzeros: shape \[2, 3\], but .* have \[2, 4\]",
    ),
    ({"qzeros": torch.zeros(4, 2, dtype=torch.int32)}, r"qzeros: shape \[4, 2\]"),
    ({"qzeros": torch.zeros(2, 4, dtype=torch.int64)}, "qzeros: torch.int64"),
    ({"g_idx": torch.zeros(64)}, "g_idx: torch.float32"),
    (
        {"g_idx": torch.zeros(63, dtype=torch.int32)},
        r"g_idx: torch.int32 \[63\] is not the group of each of its 64",
    ),
    (
        {"g_idx": torch.zeros(64, dtype=torch.int32)},
        "g_idx: does not give 32 columns to each of 2 groups",
    ),
    ({"g_idx": torch.arange(64, dtype=torch.int32) // 32 + 1}, "g_idx: does not give"),
    ({"g_idx": torch.arange(64, dtype=torch.int32) // 32 - 1}, "g_idx: does not give"),
]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("change", "message"), GPTQ_DAMAGE)
def test_damaged_parts_of_gptq(change, message, symmetric):
    tensors = {**gptq(drawn(32, 64, 32, symmetric)), **change}
    with pytest.raises(RacError, match=f"^m.{message}"):
        read_gptq({k: v for k, v in tensors.items() if v is not None}, 4, 32, symmetric)


AWQ_DAMAGE = [
    *GPTQ_DAMAGE[:6],
    (
        {"qweight": torch.zeros(63, 4, dtype=torch.int32)},
        "qweight: 63 columns are no multiple of config.json's groups of 32",
    ),
    (
        {"qweight": torch.zeros(64, 5, dtype=torch.int32)},
        r"scales: shape \[2, 32\], but .* have \[2, 40\]",
    ),
    ({"scales": torch.full((2, 32), float("nan"))}, "scales: torch.float32, or not finite"),
    (
        {"qzeros": torch.zeros(2, 3, dtype=torch.int32)},
        r"qzeros: shape \[2, 3\], but .* have \[2, 4\]",
    ),
    ({"g_idx": torch.zeros(64, dtype=torch.int32)}, "g_idx: AWQ does not reorder columns"),
]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("change", "message"), AWQ_DAMAGE)
def test_damaged_parts_of_awq(change, message, symmetric):
    tensors = {**awq(drawn(32, 64, 32, symmetric)), **change}
    with pytest.raises(RacError, match=f"^m.{message}"):
        read_awq({k: v for k, v in tensors.items() if v is not None}, 32, symmetric)


def test_awq_with_zero_points_that_config_json_does_not_have():
    with pytest.raises(
        RacError, match=r"^m\.qzeros: not all 8, but config\.json says zero_point: false; restore"
    ):
        read_awq(awq(drawn(32, 64, 32, False)), 32, True)


@pytest.mark.parametrize("rows", [1, 2])
def test_3_bits_need_whole_words(rows):
    with pytest.raises(
        RacError, match=rf"^m\.qweight: {rows} words per row hold no whole number of 3-bit codes"
    ):
        read_gptq({"qweight": torch.zeros(rows, 32, dtype=torch.int32)}, 3, None, True)


CHANGES = {
    "transposed": lambda tensor: (
        tensor.T.contiguous() if tensor.dim() > 1 else torch.zeros_like(tensor)
    ),
    "a line less": lambda tensor: tensor[1:],
    "a column less": lambda tensor: tensor[..., 1:],
    "a line more": lambda tensor: torch.cat([tensor, tensor[:1]]),
    "twice as wide": lambda tensor: torch.cat([tensor, tensor], dim=-1),
    "one dimension more": lambda tensor: tensor[None],
    "flat": lambda tensor: tensor.flatten() if tensor.dim() > 1 else tensor[:, None],
    "empty": lambda tensor: tensor[:0],
    "bytes": lambda tensor: tensor.to(torch.uint8),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("part", ["qweight", "qzeros", "scales", "g_idx"])
@pytest.mark.parametrize("bits", [4, 3, 2])
def test_parts_of_another_shape_are_refused_by_name(bits, part, change):
    """Whatever one part is changed to, the message names a part."""
    weight = drawn(32, 192, 32, False, bits)
    tensors = gptq(weight, 2)
    tensors[part] = CHANGES[change](tensors[part])
    with pytest.raises(
        RacError, match=r"^m\.(qweight|qzeros|scales|g_idx): .*(copy|restore|save|damaged)"
    ):
        read(tensors, weight, 32, False, 2)


GPTQ = {"bits": 4, "group_size": 32, "sym": True}
AWQ = {"bits": 4, "group_size": 32, "zero_point": True}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"bits": 5},
            r"bits is 5 \(Input should be 2, 3, 4 or 8\); leave out --quantization rac, or",
        ),
        ({"bits": "4"}, "bits is '4'"),
        ({"bits": True}, "bits is True"),
        ({"bits": None}, "bits is None"),
        ({"group_size": 0}, "group_size is 0 .*a number of columns, or -1 for one scale per row"),
        ({"group_size": -128}, "group_size is -128"),
        ({"sym": 1}, "sym is 1"),
        ({"dynamic": ["a"]}, "dynamic is"),
        ({"dynamic": {"a": 8}}, "dynamic.a is 8"),
        ({"dynamic": {"a": {"bits": 16}}}, "dynamic.a.bits is 16"),
        ({"dynamic": {"a": {"group_size": 0}}}, "dynamic.a.group_size is 0"),
        ({"dynamic": {"+:(": {}}}, "dynamic is .* is no pattern"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'"),
        ({"format": 2}, "format is 2"),
        ({"is_marlin_format": True}, "is_marlin_format is True"),
    ],
)
def test_malformed_gptq_entries(changes, message):
    with pytest.raises(RacError, match=rf"^config.json: quantization_config.{message}"):
        GptqEntries.of({**GPTQ, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 8}, "bits is 8"),
        ({"group_size": 0}, "group_size is 0"),
        ({"zero_point": "yes"}, "zero_point is 'yes'"),
        ({"version": "gemv_fast"}, "version is 'gemv_fast' .*only words of version gemm are read"),
        ({"backend": "llm-awq"}, "backend is 'llm-awq' .*only words of version gemm are read"),
    ],
)
def test_malformed_awq_entries(changes, message):
    with pytest.raises(RacError, match=rf"^config.json: quantization_config.\w*{message}"):
        AwqEntries.of({**AWQ, **changes})


def test_entries_that_are_missing_and_those_of_other_writers():
    for name in GPTQ:
        with pytest.raises(RacError, match=rf"quantization_config\.{name} is missing"):
            GptqEntries.of({key: value for key, value in GPTQ.items() if key != name})
    old = GptqEntries.of({**GPTQ, "dynamic": None, "desc_act": None, "lm_head": None})
    assert (old.checkpoint_format, old.of_module("m")) == ("gptq", old)
    other = AwqEntries.of({"w_bit": 4, "q_group_size": 64, "zero_point": True, "version": "GEMM"})
    assert (other.bits, other.group_size) == (4, 64)


def test_the_first_dynamic_rule_that_matches_counts():
    rules = {
        r"-:.*\.o$": {},
        r"+:.*\.down": {"bits": 3, "group_size": 96, "sym": False},
        r".*\.(q|down)$": {"bits": 2, "group_size": -1, "desc_act": True},
    }
    entries = GptqEntries.of({**GPTQ, "dynamic": rules})
    found = {name: entries.of_module(name) for name in ("a.o", "a.down", "a.q")}
    assert {n: (e.bits, e.group_size, e.sym, e.desc_act) for n, e in found.items()} == {
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
    found, order = read_gptq(tensors, bits, group, symmetric)
    assert order is None
    torch.testing.assert_close(found.dequantized(torch.float32), weight.meant, rtol=0, atol=0)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 96])
def test_an_awq_weight_that_auto_round_packed(group, symmetric):
    """Packed by another project's writer, format auto_awq."""
    writer = pytest.importorskip("auto_round.export.export_to_awq.utils")
    weight = drawn(64, 96, group, symmetric, least=0)
    zeros = 8 if symmetric else weight.zeros.T.contiguous()
    layer = writer.WQLinear_GEMM.from_linear(
        linear_of(weight), 4, group, scales=weight.scale.T.contiguous(), zeros=zeros, device="cpu"
    )
    tensors = {part: getattr(layer, part) for part in ("qweight", "qzeros", "scales")}
    found = read_awq(tensors, group, symmetric)
    torch.testing.assert_close(found.dequantized(torch.float32), weight.meant, rtol=0, atol=0)
