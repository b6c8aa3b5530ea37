import pytest
import torch

from rac_modifier.quantization.grid import Grid
from rac_modifier.recovery.distill import recover
from rac_modifier.recovery.on_grid import OnGrid, QuantizedWeight, on_grid
from rac_modifier.settings.recovery import RecoverySettings
from tests.recovery.recovery_helpers import LiveTeacher, dense_and_sparse, kl_of, sequences
from tests.tiny import linears


def rounded(weight: torch.Tensor, scale: torch.Tensor, bits: int = 4) -> torch.Tensor:
    """Codes times scale with one scale per group of 32 columns, written again for the tests."""
    rows, columns = weight.shape
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    groups = weight.reshape(rows, columns // 32, 32)
    codes = (groups / scale.float()[..., None]).clamp(low, high).round()
    return (codes * scale.float()[..., None]).reshape(rows, columns)


def scales(weight: torch.Tensor) -> torch.Tensor:
    rows, columns = weight.shape
    return (
        (weight.reshape(rows, columns // 32, 32).abs().amax(-1) / 7.5)
        .clamp(min=1e-6)
        .to(torch.bfloat16)
    )


def test_the_forward_value_is_what_will_be_stored():
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    form = OnGrid(QuantizedWeight(Grid("int", 4, 32), scales(weight)))
    assert torch.equal(form(weight), rounded(weight, scales(weight)))
    with torch.no_grad():
        form.log_change.add_(0.1)
    changed = (scales(weight).float() * torch.tensor(0.1).exp()).to(torch.bfloat16)
    assert torch.equal(form(weight), rounded(weight, changed))


def with_zero_points() -> tuple[QuantizedWeight, torch.Tensor, torch.Tensor]:
    """Two groups of 32 columns with 2 bits, their scales and zero points, spread over the columns."""
    zero = torch.tensor([[-2, 1], [0, -1]], dtype=torch.int8)
    scale = torch.tensor([[0.5, 0.25], [1.0, 0.5]]).to(torch.bfloat16)
    quantized = QuantizedWeight(Grid("int", 2, 32, symmetric=False), scale, zero=zero)
    return (
        quantized,
        scale.float().repeat_interleave(32, dim=1),
        zero.float().repeat_interleave(32, dim=1),
    )


def test_the_forward_value_with_zero_points_is_what_will_be_stored():
    quantized, scale, zero = with_zero_points()
    weight = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    form = OnGrid(quantized)
    stored = (weight / scale + zero).clamp(-2, 1).round()
    assert len(stored.unique()) == 4
    assert torch.equal(form(weight), (stored - zero) * scale)


def test_gradients_with_zero_points_stop_where_a_code_is_clamped():
    quantized, scale, zero = with_zero_points()
    generator = torch.Generator().manual_seed(1)
    master = torch.randn(2, 64, generator=generator).requires_grad_()
    outer = torch.randn(2, 64, generator=generator)
    form = OnGrid(quantized)
    form(master).backward(outer)
    x = master.detach() / scale
    outside = (x + zero > 1) | (x + zero < -2)
    assert 20 < int(outside.sum()) < 108
    assert torch.equal(master.grad, torch.where(outside, 0.0, outer))
    codes = (x + zero).clamp(-2, 1).round() - zero
    to_scale = outer * torch.where(outside, codes, codes - x) * scale
    torch.testing.assert_close(form.log_change.grad, to_scale.unflatten(1, (2, 32)).sum(-1))


def test_gradients_pass_through_where_nothing_is_clamped():
    """By the formulas of LSQ, element by element."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(2, 32, generator=generator)
    weight[0, 0], weight[1, 3] = 9.0, -9.0  # both beyond the grid
    scale = torch.full((2, 1), 0.25).to(torch.bfloat16)
    form = OnGrid(QuantizedWeight(Grid("int", 4, 32), scale))
    master = weight.clone().requires_grad_()
    outer = torch.randn(2, 32, generator=generator)
    form(master).backward(outer)
    x = weight / 0.25
    outside = (x > 7) | (x < -8)
    assert bool(outside[0, 0] and outside[1, 3])
    assert torch.equal(master.grad, torch.where(outside, 0.0, outer))
    to_scale = torch.where(outside, x.clamp(-8, 7).round(), x.round() - x)
    expected = (outer * to_scale).sum(1, keepdim=True) * 0.25  # d scale / d log_change = scale
    torch.testing.assert_close(form.log_change.grad, expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_recovery_ends_on_the_grid_with_every_zero(bits):
    dense, sparse = dense_and_sparse()
    quantized, zeros = {}, {}
    for name, linear in linears(sparse).items():
        if name != "lm_head":
            quantized[name] = QuantizedWeight(
                Grid("int", bits, 32), scales(linear.weight.detach()) / (1 if bits == 4 else 16)
            )
            zeros[name] = linear.weight.detach() == 0
            linear.register_parameter(
                "weight_scale",
                torch.nn.Parameter(quantized[name].scale.clone(), requires_grad=False),
            )
    held_out = sequences(20, seed=2)
    settings = RecoverySettings(learning_rate=3e-3, step_tokens=300, batch_tokens=400)
    result = recover(
        sparse,
        LiveTeacher(dense),
        sequences(120, seed=1),
        held_out,
        settings,
        quantized=quantized,
        progress=False,
    )
    assert result.kl_after < result.kl_before
    assert result.kl_after == pytest.approx(
        kl_of(dense, sparse, held_out), rel=1e-4
    )  # what is stored is what was measured
    moved = 0
    for name, linear in linears(sparse).items():
        if name == "lm_head":
            continue
        weight, scale = linear.weight.detach(), linear.weight_scale.detach()
        assert scale.dtype == torch.bfloat16
        assert torch.equal(weight, rounded(weight, scale, bits))
        assert bool((weight == 0)[zeros[name]].all())
        moved += int((scale != quantized[name].scale).sum())
    assert moved > 0  # scales are trained too
    assert not any("parametrizations" in name for name, _ in sparse.named_parameters())


def test_fake_quantization_is_off_inside_and_back_afterwards():
    _, sparse = dense_and_sparse()
    linear = sparse.model.layers[0].mlp.up_proj
    linear.quantization_enabled = True
    with on_grid(sparse, {}):
        assert linear.quantization_enabled is False
    assert linear.quantization_enabled is True


def test_training_starts_from_the_master_weights_and_keeps_the_rounded_ones_where_that_is_better():
    """With a learning rate of nearly nothing, what is kept tells where training started."""
    dense, sparse = dense_and_sparse()
    name, linear = next((n, m) for n, m in linears(sparse).items() if n.endswith("up_proj"))
    master, scale = linear.weight.detach().clone(), scales(linear.weight.detach())
    held_out = sequences(20, seed=2)
    settings = RecoverySettings(learning_rate=1e-12, step_tokens=300, batch_tokens=400)
    for start, kept in ((master, "before"), (rounded(master, scale), "after step")):
        other = rounded(master, scale)
        if kept != "before":  # the rounded weight is a bad one, so the master is better
            other = other.roll(1, 0) * (master != 0)
        linear.weight.data.copy_(other)
        quantized = {name: QuantizedWeight(Grid("int", 4, 32), scale, start)}
        masks = {f"{name}.weight": master != 0}
        result = recover(
            sparse,
            LiveTeacher(dense),
            sequences(40, seed=1),
            held_out,
            settings,
            masks=masks,
            quantized=quantized,
            progress=False,
        )
        assert result.kept.startswith(kept)
        assert torch.equal(linear.weight.detach(), rounded(master, scale))
