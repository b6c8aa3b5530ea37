"""Integer weights of every form, on every kernel."""

import math

import pytest
import torch
from torch import Tensor

from rac_modifier.errors import RacError
from rac_modifier.kernels.cpu import operator, pack_scale, pack_values
from rac_modifier.kernels.cpu.library import Library
from rac_modifier.kernels.cpu.support import support
from tests.kernels.cpu.kernel_helpers import (
    BLOCK,
    FORMS,
    LEVELS,
    Packed,
    activation_bits,
    assert_integer_product,
    assert_product,
    bitmask_of,
    check_form,
    integers,
    multiply,
    pack_dense,
    random_mask,
    scaled,
    set_activation_bits,
    sparse,
    take,
    threads,
)

DTYPES = [torch.bfloat16, torch.float32]
FORM = pytest.mark.parametrize("form", FORMS)
# Tokens: each way of the kernels, and pairs of panels with every tail.
TOKENS = (1, 2, 3, 4, 5, 8, 9, 15, 16, 17, 32, 33, 65, 72, 81)


def levels_of(weight: Packed) -> int:
    """Return the largest integer of x on the kernel in use."""
    return LEVELS[activation_bits(weight.data)]


def exact_product(x: Tensor, dense: Tensor) -> Tensor:
    """Multiply integers; only the sums of blocks are rounded, to float32."""
    blocks = zip(x.split(BLOCK, 1), dense.split(BLOCK, 1), strict=True)
    return sum((block.long() @ part.long().T).float() for block, part in blocks)


@pytest.mark.parametrize(
    ("form", "bits", "columns"),
    [(f, 8 * (2 - i % 2), (37, 512, 600)[i % 3]) for i, f in enumerate(sorted(FORMS) * 2)]
    + [(f, 8 * (1 + i % 2), (600, 37, 512)[i % 3]) for i, f in enumerate(sorted(FORMS))],
)
def test_sums_are_exact(kernel, monkeypatch, form, bits, columns):
    """x of integers, the largest of each block the highest level, has a scale of 1."""
    monkeypatch.setattr(operator, "_most_tokens", lambda *arguments: math.inf)
    rows = 16 * 4 + 5  # the fifth panel of 16 rows is alone, and not whole
    dense, weight = integers(form, rows, columns, zeros=True)
    set_activation_bits(weight, bits)
    most = levels_of(weight)
    for m in TOKENS:
        if kernel == "amx" and m > 64:
            break  # these tiles take bfloat16
        x = torch.randint(-most, most + 1, (m, columns)).float()
        x[:, 0] = x[:, -1] = most
        y = multiply(x, weight, None, pack_scale(torch.ones(rows, 1)))
        assert torch.equal(y, exact_product(x, dense)), m


@FORM
@pytest.mark.parametrize("value", [1.0, -1.0])
def test_the_largest_sums_fit(kernel, value, form):
    """512 products of the largest weight and the largest integer in a block, of both signs."""
    bits, masked = FORMS[form]
    most = (1 << bits) - 1
    for weight_value, zero in ((-128, None),) if bits == 8 else ((most, 0), (-most, most)):
        dense = torch.full((16, 1024), weight_value, dtype=torch.int8)
        zeros = None if zero is None else torch.full((16, 1), zero, dtype=torch.uint8)
        mask = torch.ones(16, 1024, dtype=torch.bool)
        data = pack_dense(dense, bits, zeros)
        if masked:
            data = pack_values(dense[mask], bitmask_of(mask), (16, 1024), bits, zeros)
        for m in (1, 3, 12):
            x = torch.full((m, 1024), value)
            y = multiply(x, Packed(data, 16, 1024), None, pack_scale(torch.ones(16, 1)))
            torch.testing.assert_close(y, torch.full((m, 16), weight_value * 1024 * value))


@pytest.mark.parametrize(
    ("form", "bits", "m"),
    [(f, 8 * (1 + i % 2), (1, 2, 5, 20, 33)[i % 5]) for i, f in enumerate(sorted(FORMS) * 2)],
)
def test_a_value_that_is_not_finite_makes_its_token_nan_and_no_other(kernel, m, form, bits):
    _, weight = integers(form, 20, 640)
    set_activation_bits(weight, bits)
    scale = pack_scale(torch.ones(20, 5))
    x = torch.randn(m + 1, 640)
    clean = multiply(x, weight, None, scale)
    for token, value in ((0, math.nan), (0, math.inf), (m, -math.inf)):
        damaged = x.clone()
        damaged[token, 571] = value
        y = multiply(damaged, weight, None, scale)
        assert not y[token].isfinite().any()
        others = torch.arange(m + 1) != token
        assert torch.equal(y[others], clean[others])


@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-38, 1e30])
def test_tiny_and_huge_activations(kernel, size):
    dense, weight = integers("int8", 20, 100)
    x = torch.randn(3, 100) * size
    y = multiply(x, weight, None, pack_scale(torch.ones(20, 1)))
    torch.testing.assert_close(y, x @ dense.float().T, rtol=1e-3, atol=max(1e-25, size / 10))


@FORM
def test_chunks_of_tokens_and_groups_of_panels_on_threads(kernel, monkeypatch, form):
    """More tokens than AMX uses at a time, with a tail, and more panels than share them."""
    monkeypatch.setattr(operator, "_most_tokens", lambda *arguments: math.inf)
    rows = 16 * 17 + 3
    dense, weight = integers(form, rows, 192, 3, True)
    scale = torch.rand(rows, 3) + 0.01
    for m in (7, 64 if kernel == "amx" else 401):
        x, bias = torch.randn(m, 192), torch.randn(rows)
        y = multiply(x, weight, bias, pack_scale(scale))
        assert_integer_product(y, x, scaled(dense, scale), 3, bias)
        with threads(3):
            assert torch.equal(multiply(x, weight, bias, pack_scale(scale)), y)


def test_bfloat16_tokens_of_8_bit_weights(kernel):
    """With AVX512-BF16 up to 32 tokens become integers, and more stay bfloat16."""
    dense, weight = integers("int8", 37, 600)
    scale = torch.rand(37, 1) + 0.01
    for m in (8, 9, 32, 33):
        x, bias = torch.randn(m, 600).bfloat16(), torch.randn(37)
        y = multiply(x, weight, bias, pack_scale(scale))
        assert_integer_product(y, x, scaled(dense, scale), 1, bias)


def test_no_chunk_has_fewer_tokens_than_are_multiplied_at_a_time(native_path, monkeypatch):
    """230,401 tokens in chunks of 480 would leave one; what follows x in memory is not a number."""
    m, scale = 230_401, pack_scale(torch.ones(32, 1))
    memory = torch.ones(m + 8, 32, dtype=torch.bfloat16)
    memory[m:] = math.nan
    for name in Library(native_path).runs:
        take(native_path, name, monkeypatch)
        data = pack_dense(torch.ones(32, 32, dtype=torch.int8))
        y = multiply(memory[:m], Packed(data, 32, 32), None, scale)
        assert bool((y == 32).all()), name


@pytest.mark.parametrize("kernel", ["amx"], indirect=True)
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("form", [form for form, (bits, _) in FORMS.items() if bits < 8])
def test_tiles_multiply_many_tokens_by_codes_rounded_to_bf16(kernel, form, groups):
    """One-hot tokens read each weight. The others test the sums; 401 tokens take two chunks."""
    dense, weight = integers(form, 16 * 17 + 3, 96, groups, True)
    set_activation_bits(weight, 8 if groups > 1 else 16)  # these tiles round x to neither
    scale = torch.rand(len(dense), groups, generator=torch.Generator().manual_seed(1)) + 0.01
    exact = (dense * scale.repeat_interleave(96 // groups, dim=1)).bfloat16()
    y = multiply(torch.eye(96).bfloat16(), weight, None, pack_scale(scale))
    assert torch.equal(y, exact.T)
    for m in (65, 401):
        x, bias = torch.randn(m, 96).bfloat16(), torch.randn(len(dense))
        y = multiply(x, weight, bias, pack_scale(scale))
        assert_product(y, x, exact, bias)
        with threads(3):
            assert torch.equal(multiply(x, weight, bias, pack_scale(scale)), y)


@pytest.mark.parametrize(("form", "groups"), [(f, 1 + 2 * (i % 2)) for i, f in enumerate(FORMS)])
def test_expanded_panels(kernel, form, groups, monkeypatch):
    """The path of many tokens, in several chunks with a tail: x is not rounded."""
    monkeypatch.setattr(operator, "_most_tokens", lambda *arguments: 0)
    monkeypatch.setattr(operator, "SCRATCH_BYTES", 2 * 16 * 70 * 4)
    dense, weight = integers(form, 90, 96, groups, True)
    scale = (torch.rand(90, groups) + 0.01).bfloat16().float()
    for dtype in DTYPES:
        x, bias = torch.randn(130, 96).to(dtype), torch.randn(90)
        y = multiply(x, weight, bias, pack_scale(scale, narrow=FORMS[form][0] < 8))
        assert_integer_product(y, x, scaled(dense, scale), groups, bias)


def test_which_kernels_multiply_bytes(kernel):
    _, weight = integers("int8", 20, 64)
    takes_bytes = kernel in ("avxvnni", "avx512", "amx", "i8mm")
    assert support().multiplies_bytes == takes_bytes
    for bits, rounded_to in ((16, 16), (8, 8 if takes_bytes else 16), (16, 16)):
        set_activation_bits(weight, bits)
        assert activation_bits(weight.data) == rounded_to
        check_form(weight, "int8")
    with pytest.raises(RacError, match="activations of 4 bits; 8 and 16 are possible"):
        set_activation_bits(weight, 4)
    _, floats = sparse(random_mask(20, 64, 0.5), torch.bfloat16)
    with pytest.raises(RacError, match="activations are rounded for weights of integers only"):
        set_activation_bits(floats, 8)


@pytest.mark.parametrize(
    ("form", "scale", "message"),
    [
        ("int8", None, "scale: missing"),
        ("int8", torch.ones(40, 32), "groups of 3 columns; they must have a multiple of 4"),
        ("dense4", torch.ones(40, 24), "groups of 4 columns; they must have a multiple of 8"),
        ("dense3", torch.ones(40, 6), "groups of 16 columns; they must have a multiple of 32"),
        ("int4", torch.ones(40, 1), "1 groups, where the weight's zeros have 3"),
        ("dense8", torch.ones(40, 1).bfloat16(), "an 8-bit weight needs one in fp32"),
        *(
            ("int8", scale, r"scale .* of a weight \[40, 96\]")
            for scale in (torch.ones(40, 5), torch.ones(24, 1), torch.ones(40, 192))
        ),
    ],
)
def test_scales_that_do_not_fit_are_refused(best, form, scale, message):
    _, weight = integers(form, 40, 96, 3, zeros=form == "int4")
    packed = None if scale is None else pack_scale(scale.float()).to(scale.dtype)
    with pytest.raises(RacError, match=message):
        multiply(torch.randn(2, 96), weight, None, packed)
