"""An int8 head in two planes: exact where a logit is high, 4 bits of a code elsewhere."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rac_modifier.errors import RacError
from rac_modifier.formats.encoding import Encoding
from rac_modifier.formats.module_names import Role
from rac_modifier.formats.stored_weight import StoredWeight, all_stored
from rac_modifier.kernels import cpu
from rac_modifier.kernels.choose import serve
from rac_modifier.kernels.cpu import head
from rac_modifier.kernels.cpu.support import library_and_isa
from rac_modifier.kernels.interface import Layer

PER_TOKEN = 16 * head.PANELS  # rows that get both planes


def int8_head(rows: int, columns: int) -> tuple[StoredWeight, Tensor, Tensor]:
    """A head of every code from -128 to 127, its codes and its scales, in float64."""
    codes = torch.randint(-128, 128, (rows, columns)).to(torch.int8)
    scale = torch.rand(rows, 1) * 0.01
    return replace(all_stored(codes, "lm_head"), scale=scale), codes.double(), scale.double()


def multiplied(weight: StoredWeight, x: Tensor, bias: Tensor | None = None) -> Tensor:
    return head.linear(x, head.pack(weight, x.dtype), weight.rows, weight.columns, bias)


@pytest.mark.parametrize(("rows", "columns", "tokens"), [(70, 64, 1), (512, 130, 3), (37, 600, 70)])
def test_all_rows_of_a_few_panels_are_exact(kernel, rows, columns, tokens):
    weight, codes, scale = int8_head(rows, columns)
    x, bias = torch.randn(tokens, columns), torch.randn(rows)
    expected = x.double() @ (codes * scale).T + bias
    torch.testing.assert_close(multiplied(weight, x, bias).double(), expected, rtol=1e-4, atol=5e-3)


def test_only_the_panels_of_high_logits_read_the_low_plane(kernel):
    rows, columns = 3 * PER_TOKEN + 5, 96
    weight, codes, scale = int8_head(rows, columns)
    x = torch.randn(2, columns)
    likely = torch.tensor([[7], [rows - 1]])  # of each token; the last panel is not whole
    for token, row in enumerate(likely[:, 0].tolist()):
        codes[row], scale[row] = 100 * x[token].sign(), 0.02
    weight = replace(weight, values=codes.to(torch.int8).flatten(), scale=scale.float())
    logits = multiplied(weight, x).double()
    exact = x.double() @ (codes * scale).T
    high = (codes / 16).floor() * 16 + 8
    rough = x.double() @ (high * scale).T
    torch.testing.assert_close(logits.gather(1, likely), exact.gather(1, likely), rtol=1e-4, atol=0)
    assert torch.equal(logits.argmax(1, keepdim=True), likely)
    is_exact = (logits - exact).abs() < 5e-3
    assert (is_exact | ((logits - rough).abs() < 5e-3)).all()
    assert (is_exact.sum(1) < 2 * PER_TOKEN).all()


def test_a_token_has_the_logits_that_it_has_alone(best):
    weight, *_ = int8_head(3 * PER_TOKEN, 64)
    x = torch.randn(head._TOKENS + 3, 64)
    together = multiplied(weight, x)
    alone = torch.cat([multiplied(weight, token[None]) for token in x])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_are_in_the_dtype_of_x(best, dtype):
    weight, codes, scale = int8_head(40, 64)
    x = torch.randn(2, 1, 64).to(dtype)
    logits = multiplied(weight, x)
    assert (logits.dtype, logits.shape) == (dtype, (2, 1, 40))
    expected = x.double() @ (codes * scale).T
    torch.testing.assert_close(logits.double(), expected, rtol=1e-2, atol=1e-2)


def test_heads_that_are_split(best):
    """Dense int8 with a scale per row, and no embedding: a row of it is read from one plane."""
    weight, *_ = int8_head(64, 64)
    layer = Layer.of(weight, torch.bfloat16)
    assert serve(weight, layer, "cpu", Role.HEAD)[1] is head
    assert "two planes" in serve(weight, layer, "cpu", Role.HEAD)[0].reason
    assert serve(weight, layer, "cpu", Role.EMBEDDING)[1] is cpu
    for encoding in (Encoding("int", 4), Encoding("int", 8, 32)):
        assert serve(weight, replace(layer, encoding=encoding), "cpu", Role.HEAD)[1] is cpu


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"panels": torch.tensor([[4]])}, "no panel 4 after panel 3"),
        ({"panels": torch.tensor([[-1]])}, "no panel -1"),
        ({"panels": torch.zeros(2, 1, dtype=torch.int64)}, "panels: 16 bytes"),
        ({"scale": torch.ones(3, 1, 16)}, "scale: 192 bytes"),
        ({"x": torch.ones(1, 63)}, "another shape"),
        ({"out": torch.zeros(2, 64)}, "out: 512 bytes"),
    ],
)
def test_the_library_refuses_panels_and_sizes(best, change, named):
    weight, *_ = int8_head(64, 64)
    packed = head.pack(weight, torch.float32)
    arguments = {"x": torch.ones(1, 64), "panels": torch.tensor([[0]]), "out": torch.zeros(1, 64)}
    library, isa = library_and_isa()
    arguments |= {"scale": packed[head.LOW_SCALE], **change}
    with pytest.raises(RacError, match=named):
        library.add_panels(packed[head.LOW], **arguments, isa=isa)
