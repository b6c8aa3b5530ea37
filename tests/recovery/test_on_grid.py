"""Codes, master weights in their cells, and training through them, with rounding written again."""

import pytest
import torch

from rac_modifier.formats.encoding import Encoding
from rac_modifier.recovery.on_grid import (
    QuantizedWeight,
    _OnGrid,
    codes_of,
    master_in_cell,
    on_grid,
    pruned_share,
)
from rac_modifier.settings.recovery import RecoverySettings
from tests.recovery.recovery_helpers import dense_and_sparse, run
from tests.tiny import linears

GRIDS = [
    Encoding("int", 4, 32),
    Encoding("int", 3, 32),
    Encoding("int", 8, None),
    Encoding("float", 8, None),
]


def spread(part: torch.Tensor, columns: int = 64) -> torch.Tensor:
    return part.float().repeat_interleave(columns // part.shape[1], dim=1)


def drawn(grid: Encoding, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [12, 64] that occur in the grid, and scales [12, groups] of both signs."""
    shape = 12, 64 // (grid.group_size or 64)
    scale = ((torch.rand(shape) * 0.02 + 1e-3) * (1 - 2 * torch.randint(2, shape))).to(dtype)
    if grid.kind == "float":
        codes = torch.randn(12, 64) * torch.logspace(-4, 2, 64)
        return codes.to(torch.float8_e4m3fn).float(), scale
    high = 2 ** (grid.bits - 1)
    return torch.randint(-high, high, (12, 64)).float(), scale


def rounds_to(weight: torch.Tensor, scale: torch.Tensor, grid: Encoding) -> torch.Tensor:
    scaled = weight / spread(scale, weight.shape[1])
    if grid.kind == "float":
        return scaled.to(torch.float8_e4m3fn).float()
    high = 2 ** (grid.bits - 1)
    return scaled.clamp(-high, high - 1).round()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_codes_come_back_and_a_master_weight_is_in_their_cell_near_the_dense_weight(grid, dtype):
    codes, scale = drawn(grid, dtype)
    weight = codes * spread(scale)
    assert torch.equal(codes_of(weight.to(dtype), scale, grid), codes)
    dense = weight + torch.randn(12, 64) * 0.01
    master = master_in_cell(codes, scale, grid, dense)
    assert master.dtype == torch.float32
    assert torch.equal(rounds_to(master, scale, grid), codes)
    assert bool(((master - dense).abs() <= (weight - dense).abs() * (1 + 1e-5) + 1e-9).all())
    assert float((master - dense).abs().mean()) < 0.95 * float((weight - dense).abs().mean())


def test_codes_are_counted_from_their_zero_points():
    grid, zero = Encoding("int", 2, 32, symmetric=False), torch.randint(-2, 2, (12, 2))
    stored, scale = torch.randint(-2, 2, (12, 64)).float(), torch.rand(12, 2) * 0.02 + 1e-3
    codes, scale = stored - spread(zero), scale.to(torch.bfloat16)
    weight = codes * spread(scale)
    assert torch.equal(codes_of(weight.to(torch.bfloat16), scale, grid, zero), codes)
    master = master_in_cell(codes, scale, grid, weight + torch.randn(12, 64) * 0.004)
    assert torch.equal((master / spread(scale) + spread(zero)).round(), stored)


def test_a_master_weight_reaches_almost_half_way_to_the_nearer_neighbour_of_its_code():
    """Of every code of float8 and of int4, towards a dense weight far above and far below."""
    scale, codes = torch.full((1, 1), 0.5), torch.tensor([[2.0, 0.0, -3.0]])
    master = master_in_cell(codes, scale, Encoding("int", 4), torch.tensor([[1.1, -0.2, -1.9]]))
    torch.testing.assert_close(master, torch.tensor([[1.1, -0.2, -1.725]]))
    bytes_ = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    floats = bytes_[bytes_.isfinite()].unique()
    for grid, codes in ((GRIDS[3], floats), (Encoding("int", 4), torch.arange(-8.0, 8.0))):
        gaps = codes.diff()
        nearer = torch.minimum(torch.cat([gaps[:1], gaps]), torch.cat([gaps, gaps[-1:]]))
        for away in (-1e4, 1e4):
            target = torch.full((1, len(codes)), away)
            move = master_in_cell(codes[None], torch.ones(1, 1), grid, target)[0] - codes
            torch.testing.assert_close(move.abs(), 0.45 * nearer, rtol=1e-3, atol=0.0)
            assert bool((move * away > 0).all())


@pytest.mark.parametrize(("grid", "step"), [(Encoding("int", 4), 1.0), (GRIDS[3], 2.0**-9)])
def test_a_zero_is_pruned_where_the_dense_weight_is_above_three_quarters_of_a_step(grid, step):
    scale = torch.tensor([[0.5]])
    dense = torch.tensor([[0.7, 0.75, 0.8, -0.8]]) * step * 0.5
    assert pruned_share(torch.zeros(1, 4), scale, grid, dense) == 0.5
    assert pruned_share(torch.tensor([[0.0, 0.0, step, 0.0]]), scale, grid, dense) == 0.25


def scales(weight: torch.Tensor) -> torch.Tensor:
    largest = weight.unflatten(1, (-1, 32)).abs().amax(-1)
    return (largest / 7.5).clamp(min=1e-6).to(torch.bfloat16)


def rounded(weight: torch.Tensor, scale: torch.Tensor, bits: int = 4) -> torch.Tensor:
    grid, scale = Encoding("int", bits, 32), scale.float()
    return rounds_to(weight, scale, grid) * spread(scale, weight.shape[1])


@pytest.mark.parametrize("cached", [1 << 17, 64], ids=["one block", "a block per row"])
@pytest.mark.parametrize("zero", [None, torch.tensor([[-2, 1], [0, -1]], dtype=torch.int8)])
def test_forward_value_and_gradients_are_those_of_the_formulas(zero, cached, monkeypatch):
    """Element by element: LSQ, with a clamped code where the weight is beyond the grid."""
    monkeypatch.setattr("rac_modifier.pruning.linalg.CACHED_ON_CPU", cached)
    grid = Encoding("int", 2, 32, symmetric=zero is None)
    scale = torch.tensor([[0.5, 0.25], [1.0, 0.5]]).to(torch.bfloat16)
    points, wide = spread(torch.zeros(2, 2) if zero is None else zero), spread(scale)
    master, outer = torch.randn(2, 64), torch.randn(2, 64)
    for column, end in enumerate((-2.0, 1.0)):  # an end of the grid itself is not clamped
        master[:, column] = ((end - points) * wide)[:, column]
    master[0, 40] = 3e38  # over its scale, 0.25, it is infinite
    master.requires_grad_()
    form = _OnGrid(QuantizedWeight(grid, scale, zero=zero))
    value = form(master)
    x = master.detach() / wide
    codes = (x + points).clamp(-2, 1).round() - points
    assert len(codes.unique()) >= 4
    assert torch.equal(value, codes * wide)
    value.backward(outer)
    outside = (x + points > 1) | (x + points < -2)
    assert 20 < int(outside.sum()) < 108
    assert torch.equal(master.grad, torch.where(outside, 0.0, outer))
    to_scale = outer * torch.where(outside, codes, codes - x) * wide  # d scale / d log_change
    torch.testing.assert_close(form.log_change.grad, to_scale.unflatten(1, (2, 32)).sum(-1))
    with torch.no_grad():
        form.log_change.add_(0.1)
    changed = spread((scale.float() * torch.tensor(0.1).exp()).to(torch.bfloat16))
    codes = (master.detach() / changed + points).clamp(-2, 1).round() - points
    assert torch.equal(form(master), codes * changed)


def test_fake_quantization_is_off_inside():
    _, sparse = dense_and_sparse()
    sparse.lm_head.quantization_enabled = True
    with on_grid(sparse, {}):
        assert sparse.lm_head.quantization_enabled is False
    assert sparse.lm_head.quantization_enabled is True


@pytest.mark.parametrize("worse", ["master", "stored"])
def test_training_starts_from_the_master_weights_and_keeps_the_better_ones(worse):
    """With a learning rate of nearly nothing, what is kept tells where training started."""
    dense, sparse = dense_and_sparse()
    name, linear = next((n, m) for n, m in linears(sparse).items() if n.endswith("up_proj"))
    weight, scale = linear.weight.detach().clone(), scales(linear.weight.detach())
    good = rounded(weight, scale)
    bad = good.roll(1, 0) * (weight != 0)
    linear.weight.data.copy_(bad if worse == "stored" else good)
    quantized = QuantizedWeight(Encoding("int", 4, 32), scale, weight if worse == "stored" else bad)
    settings = RecoverySettings(learning_rate=1e-12, step_tokens=300, batch_tokens=400)
    masks = {f"{name}.weight": weight != 0}
    result = run(sparse, dense, settings, masks=masks, quantized={name: quantized})
    assert result.kept.startswith("before" if worse == "master" else "after step")
    assert torch.equal(linear.weight.detach(), good)
