"""Master weights in the cells of their codes, against grids that are written again here."""

import pytest
import torch

from rac_modifier.quantization.grid import Grid
from rac_modifier.recovery.cells import codes_of, master_in_cell, pruned_share, spread_scales

GRIDS = [Grid("int", 4, 32), Grid("int", 3, 32), Grid("int", 8, None), Grid("float", 8, None)]


def drawn(grid: Grid, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [12, 64] that occur in the grid, and scales [12, groups] of both signs."""
    shape = 12, 64 // (grid.group_size or 64)
    scale = ((torch.rand(shape) * 0.02 + 1e-3) * (1 - 2 * torch.randint(2, shape))).to(dtype)
    if grid.kind == "float":
        return (torch.randn(12, 64) * torch.logspace(-4, 2, 64)).to(
            torch.float8_e4m3fn
        ).float(), scale
    high = 2 ** (grid.bits - 1)
    return torch.randint(-high, high, (12, 64)).float(), scale


def rounds_to(weight: torch.Tensor, scale: torch.Tensor, grid: Grid) -> torch.Tensor:
    groups = weight.reshape(12, scale.shape[1], -1) / scale.float()[..., None]
    if grid.kind == "float":
        return groups.to(torch.float8_e4m3fn).float().reshape(weight.shape)
    high = 2 ** (grid.bits - 1)
    return groups.clamp(-high, high - 1).round().reshape(weight.shape)


def test_codes_are_counted_from_their_zero_points():
    grid = Grid("int", 2, 32, symmetric=False)
    zero = torch.randint(-2, 2, (12, 2), dtype=torch.int8)
    stored = torch.randint(-2, 2, (12, 64)).float()
    codes = stored - zero.repeat_interleave(32, dim=1)
    scale = (torch.rand(12, 2) * 0.02 + 1e-3).to(torch.bfloat16)
    spread = scale.float().repeat_interleave(32, dim=1)
    weight = (codes * spread).to(torch.bfloat16)
    assert torch.equal(codes_of(weight, scale, grid, zero), codes)
    dense = codes * spread + torch.randn(12, 64) * 0.004
    master = master_in_cell(codes, scale, grid, dense)
    back = (master / spread + zero.repeat_interleave(32, dim=1)).round()
    assert torch.equal(back, stored)
    assert float((master - dense).abs().mean()) < 0.9 * float((codes * spread - dense).abs().mean())


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_master_weight_rounds_to_its_code_and_is_near_the_dense_weight(grid):
    codes, scale = drawn(grid)
    stored = codes * spread_scales(scale.float(), grid, 64)
    dense = stored + torch.randn(12, 64) * 0.01
    master = master_in_cell(codes, scale, grid, dense)
    assert master.dtype == torch.float32
    assert torch.equal(rounds_to(master, scale, grid), codes)
    assert bool(((master - dense).abs() <= (stored - dense).abs() * (1 + 1e-5) + 1e-9).all())
    assert float((master - dense).abs().mean()) < 0.95 * float((stored - dense).abs().mean())
    inside = rounds_to(stored + 0.8 * (dense - stored), scale, grid) == codes
    far = ~inside & (codes.abs() < 7)
    assert bool((master != stored)[far].all())


def test_a_dense_weight_inside_the_cell_is_the_master_weight():
    scale = torch.full((1, 1), 0.5)
    codes, dense = torch.tensor([[2.0, 0.0, -3.0]]), torch.tensor([[1.1, -0.2, -1.9]])
    master = master_in_cell(codes, scale, Grid("int", 4), dense)
    torch.testing.assert_close(
        master, torch.tensor([[1.1, -0.2, -1.725]])
    )  # -3 * 0.5 = -1.5, and 0.45 * 0.5 beyond


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_codes_come_back_from_weights_rounded_to_16_bits(grid, dtype):
    codes, scale = drawn(grid, dtype)
    weight = (codes * spread_scales(scale.float(), grid, 64)).to(dtype)
    assert torch.equal(codes_of(weight, scale, grid), codes)


def test_rounding_explains_the_zeros_of_a_dense_model_and_not_those_of_pruning():
    dense = torch.randn(64, 128)
    grid = Grid("int", 4, 32)
    scale = dense.view(64, 4, 32).abs().amax(-1) / 7.5 * (1 - 2 * torch.randint(2, (64, 4)))
    codes = codes_of(dense, scale, grid)
    assert float((codes == 0).float().mean()) > 0.1
    assert pruned_share(codes, scale, grid, dense) == 0.0
    kept = dense.abs() > dense.abs().flatten().kthvalue(dense.numel() * 3 // 10).values
    pruned = pruned_share(codes * kept, scale, grid, dense)
    assert 0.05 < pruned < 0.3
    assert pruned == float(
        (~kept & (dense.abs() > 0.75 * spread_scales(scale.abs(), grid, 128))).float().mean()
    )


def test_a_master_weight_reaches_almost_half_way_to_the_nearer_neighbour_of_its_code():
    """Of every code of float8 and of int4, towards a dense weight far above and far below."""
    bytes_ = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    for grid, codes in (
        (Grid("float", 8, None), bytes_[bytes_.isfinite()].unique()),
        (Grid("int", 4, None), torch.arange(-8.0, 8.0)),
    ):
        gaps = codes.diff()
        nearer = torch.minimum(torch.cat([gaps[:1], gaps]), torch.cat([gaps, gaps[-1:]]))
        for away in (-1e4, 1e4):
            master = master_in_cell(
                codes[None], torch.ones(1, 1), grid, torch.full((1, len(codes)), away)
            )[0]
            torch.testing.assert_close((master - codes).abs(), 0.45 * nearer, rtol=1e-3, atol=0.0)
            assert bool(((master - codes) * away > 0).all())


@pytest.mark.parametrize(
    ("grid", "step"), [(Grid("int", 4, None), 1.0), (Grid("float", 8, None), 2.0**-9)]
)
def test_a_zero_is_pruned_where_the_dense_weight_is_above_three_quarters_of_a_step(grid, step):
    scale = torch.tensor([[0.5]])
    dense = torch.tensor([[0.7, 0.75, 0.8, -0.8]]) * step * 0.5
    assert pruned_share(torch.zeros(1, 4), scale, grid, dense) == 0.5
    assert pruned_share(torch.tensor([[0.0, 0.0, step, 0.0]]), scale, grid, dense) == 0.25
