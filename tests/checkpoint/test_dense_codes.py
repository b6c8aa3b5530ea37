"""Dense weights of 4 bits and fewer: read as compressed-tensors writes them, and refused where parts do not fit."""

from __future__ import annotations

import pytest
import torch

from rac_modifier.checkpoint.dense_codes import check_codes, why_not_codes
from rac_modifier.errors import RacError


def words(codes: list[list[int]], bits: int = 4) -> torch.Tensor:
    """Rows of codes as int32, the first code in the lowest bits; the last word is filled up with zeros."""
    packed = []
    for row in codes:
        number = sum(code << bits * i for i, code in enumerate(row))
        numbers = [number >> 32 * at & 0xFFFFFFFF for at in range(-(-len(row) * bits // 32))]
        packed.append([n - (1 << 32) if n >= 1 << 31 else n for n in numbers])
    return torch.tensor(packed, dtype=torch.int32)


def drawn(
    rows: int, columns: int, groups: int, bits: int = 4
) -> tuple[dict[str, torch.Tensor], list[list[float]]]:
    """The tensors of an asymmetric weight, and the weight, code by code."""
    codes = torch.randint(0, 1 << bits, (rows, columns)).tolist()
    zeros = torch.randint(0, 1 << bits, (rows, groups)).tolist()
    scale = torch.rand(rows, groups) + 0.5
    width = columns // groups
    weight = [
        [(codes[n][k] - zeros[n][k // width]) * float(scale[n, k // width]) for k in range(columns)]
        for n in range(rows)
    ]
    by_group = [[zeros[n][g] for n in range(rows)] for g in range(groups)]
    tensors = {
        "weight_packed": words(codes, bits),
        "weight_scale": scale,
        "weight_shape": torch.tensor([rows, columns]),
        "weight_zero_point": words(by_group, bits).T.contiguous(),
    }
    return tensors, weight


@pytest.mark.parametrize("form", ["asymmetric", "symmetric"])
@pytest.mark.parametrize(
    ("rows", "columns", "groups"),
    [(1, 8, 1), (3, 64, 2), (16, 24, 3), (9, 32, 1), (5, 7, 1), (8, 12, 2)],
)
def test_the_weight_is_that_of_its_codes(rows, columns, groups, form):
    tensors, weight = drawn(rows, columns, groups)
    symmetric = form == "symmetric"
    if symmetric:
        tensors["weight_zero_point"] = words([[8] * rows] * groups).T
        weight = drawn_with(tensors, rows, columns, groups)
        del tensors["weight_zero_point"]
    found = check_codes(tensors, "w", None if groups == 1 else columns // groups, symmetric)
    assert (found.rows, found.columns, found.bits, found.density) == (rows, columns, 4, 1.0)
    assert (found.zeros is None) == symmetric
    torch.testing.assert_close(found.dequantized(torch.float32), torch.tensor(weight))
    if found.zeros is not None:  # what the kernels keep: a code is a value and its code of zero
        codes = found.dense().view(rows, groups, -1) + found.zeros[:, :, None].to(torch.int8)
        assert torch.equal(words(codes.view(rows, columns).tolist()), tensors["weight_packed"])


def test_zero_points_of_all_rows_in_one_line_of_words():
    """As read from a file: the words of a line lie side by side."""
    tensors, weight = drawn(8, 32, 2)
    tensors["weight_zero_point"] = torch.tensor(
        tensors["weight_zero_point"].tolist(), dtype=torch.int32
    )
    assert tensors["weight_zero_point"].stride() == (2, 1)
    found = check_codes(tensors, "w", 16, False)
    torch.testing.assert_close(found.dequantized(torch.float32), torch.tensor(weight))


def drawn_with(
    tensors: dict[str, torch.Tensor], rows: int, columns: int, groups: int
) -> list[list[float]]:
    """The weight of these words with a code of zero of 8."""
    return [
        [
            (((int(tensors["weight_packed"][n, k // 8]) >> 4 * (k % 8)) & 15) - 8)
            * float(tensors["weight_scale"][n, k // (columns // groups)])
            for k in range(columns)
        ]
        for n in range(rows)
    ]


@pytest.mark.parametrize("bits", [3, 2])
@pytest.mark.parametrize(
    ("rows", "columns", "groups"), [(1, 8, 1), (3, 64, 2), (16, 24, 3), (9, 37, 1), (11, 96, 3)]
)
def test_weights_of_few_bits(rows, columns, groups, bits):
    tensors, weight = drawn(rows, columns, groups, bits)
    found = check_codes(tensors, "w", None if groups == 1 else columns // groups, False, bits)
    assert (found.rows, found.columns, found.bits, found.density) == (rows, columns, bits, 1.0)
    torch.testing.assert_close(found.dequantized(torch.float32), torch.tensor(weight))
    codes = found.dense().view(rows, groups, -1) + found.zeros[:, :, None].to(torch.int8)
    assert torch.equal(words(codes.view(rows, columns).tolist(), bits), tensors["weight_packed"])


@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, None])
def test_what_compressed_tensors_compresses(group, symmetric, bits):
    """Its own compressor writes the tensors, and its own decompressor says what they mean."""
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    arguments = (
        {"strategy": "channel"} if group is None else {"strategy": "group", "group_size": group}
    )
    scheme = QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(num_bits=bits, symmetric=symmetric, **arguments),
    )
    shape = (20, 1 if group is None else 96 // group)
    state = {"weight": torch.randn(20, 96), "weight_scale": torch.rand(shape) / 4 + 0.1}
    if not symmetric:
        state["weight_zero_point"] = torch.randint(
            -(1 << (bits - 1)), 1 << (bits - 1), shape, dtype=torch.int8
        )
    compressor = PackedQuantizationCompressor
    tensors = compressor.compress(state, scheme)
    if tensors["weight_packed"].shape[1] == -(-96 // 10):  # 0.17, which vLLM 0.32 asks for
        with pytest.raises(
            RacError,
            match=r"^w\.weight_packed: 10 words of 96 values of 3 bits are ten in each, .*0\.19 or",
        ):
            check_codes(tensors, "w", group, symmetric, bits)
        return
    found = check_codes(tensors, "w", group, symmetric, bits)
    torch.testing.assert_close(
        found.dequantized(torch.float32),
        compressor.decompress(tensors, scheme)["weight"],
        rtol=1e-6,
        atol=1e-6,
    )


@pytest.mark.parametrize(
    ("scheme", "reason"),
    [
        (("int", 4, "group", "pack-quantized"), None),
        (("int", 2, "channel", "pack-quantized"), None),
        (("int", 8, "channel", "pack-quantized"), "its weights are int8"),
        (("float", 4, "group", "pack-quantized"), "its weights are float4"),
        (("int", 3, "tensor", "pack-quantized"), "its scales are per tensor"),
        (("int", 4, "group", "int-quantized"), "its format is int-quantized, not pack-quantized"),
    ],
)
def test_which_schemes_a_kernel_reads(scheme, reason):
    assert why_not_codes(*scheme, activations=False) == reason
    if reason is None:
        assert why_not_codes(*scheme, activations=True) == "its activations are quantized too"


DAMAGE = [
    ({"weight_packed": None}, "weight_packed: missing"),
    ({"weight_shape": None}, "weight_shape: missing"),
    ({"weight_scale": None}, "weight_scale: missing"),
    ({"weight_zero_point": None}, "weight_zero_point: missing"),
    ({"weight_shape": torch.tensor([9, 0])}, "weight_shape: .* is not the shape of a matrix"),
    ({"weight_shape": torch.tensor([9, 32, 1])}, "weight_shape: .* is not the shape of a matrix"),
    ({"weight_shape": torch.tensor([9.0, 32.0])}, "weight_shape: torch.float32"),
    (
        {"weight_shape": torch.tensor([2**40, 32])},
        "weight_packed: shape .* dimension 0 must be 1099511627776",
    ),
    (
        {"weight_shape": torch.tensor([9, 2**40])},
        "weight_packed: .* does not hold 1099511627776 values",
    ),
    (
        {"weight_packed": torch.zeros(9, 3, dtype=torch.int32)},
        "weight_packed: .* does not hold 32 values of 4 bits",
    ),
    (
        {"weight_packed": torch.zeros(9, 4, dtype=torch.int64)},
        "weight_packed: torch.int64 .* take 4 int32",
    ),
    ({"weight_packed": torch.zeros(36, dtype=torch.int32)}, r"weight_packed: shape \[36\]"),
    (
        {"weight_scale": torch.ones(9, 4)},
        "weight_scale: 4 per row of 32 columns.*groups of 16 columns",
    ),
    ({"weight_scale": torch.ones(8, 2)}, "weight_scale: shape"),
    ({"weight_scale": torch.full((9, 2), float("inf"))}, "weight_scale: .*not finite"),
    ({"weight_scale": torch.full((9, 2), float("nan"))}, "weight_scale: .*not finite"),
    ({"weight_zero_point": torch.zeros(9, 2, dtype=torch.int8)}, "weight_zero_point: torch.int8"),
    (
        {"weight_zero_point": torch.zeros(2, 3, dtype=torch.int32)},
        "weight_zero_point: shape .* dimension 1 must be 2",
    ),
    (
        {"weight_zero_point": torch.zeros(3, 2, dtype=torch.int32)},
        "weight_zero_point: .* does not hold 9 values",
    ),
    ({"weight_zero_point": torch.zeros(2, 2, 1, dtype=torch.int32)}, "weight_zero_point: shape"),
    (
        {"weight_g_idx": torch.zeros(32, dtype=torch.int32)},
        "weight_g_idx: its columns were reordered",
    ),
]


@pytest.mark.parametrize(("change", "message"), DAMAGE)
def test_damaged_parts(change, message):
    tensors = {**drawn(9, 32, 2)[0], **change}
    with pytest.raises(RacError, match=f"^m.{message}"):
        check_codes(
            {part: tensor for part, tensor in tensors.items() if tensor is not None}, "m", 16, False
        )


def test_zero_points_of_a_symmetric_weight_and_groups_that_config_json_does_not_have():
    tensors, _ = drawn(4, 32, 2)
    with pytest.raises(
        RacError, match=r"^m.weight_zero_point: must not be there, .*; restore the config\.json"
    ):
        check_codes(tensors, "m", 16)
    with pytest.raises(
        RacError, match=r"^m.weight_scale: 2 per row .* config\.json has one per row; restore"
    ):
        check_codes(tensors, "m", None, False)
    with pytest.raises(
        RacError, match=r"^m.weight_scale: 2 per row .* config\.json has groups of 12 columns"
    ):
        check_codes(tensors, "m", 12, False)
