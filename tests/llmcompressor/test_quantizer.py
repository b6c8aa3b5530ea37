"""Schemes on the modules that are pruned: which, and how their codes are stored."""

import pytest
import torch
from compressed_tensors.compressors.base import decompress_module
from compressed_tensors.quantization import QuantizationStatus

from rac_modifier import RacError
from rac_modifier.llmcompressor.quantizer import GroupQuantizer
from rac_modifier.settings.quantization import QuantizationSettings
from tests.tiny import linears, tiny_model


def made(model, prunes=True, **settings) -> GroupQuantizer:
    names = {m: n for n, m in linears(model).items()}
    return GroupQuantizer(QuantizationSettings(**settings), model, names, prunes=prunes)


def group(bits, size, targets=("Linear",)):
    return {
        "targets": list(targets),
        "weights": {"num_bits": bits, "strategy": "group", "group_size": size},
    }


def test_a_scheme_covers_the_pruned_modules_and_no_others():
    model = tiny_model()
    quantizer = made(model, scheme="W8A8")
    assert set(quantizer.grids) == set(linears(model).values())
    quantizer.attach(model)
    assert not hasattr(model.lm_head, "quantization_scheme")


def test_only_what_the_targets_match():
    model = tiny_model()
    quantizer = made(model, config_groups={"mlp": group(4, 32, [r"re:.*mlp.*"])})
    assert set(quantizer.described) == {name for name in linears(model) if ".mlp." in name}
    assert all(grid.bits == 4 and grid.group_size == 32 for grid in quantizer.grids.values())


def test_groups_that_do_not_divide_the_inputs_are_refused():
    with pytest.raises(RacError, match=r"q_proj: 64 inputs are no multiple of the group_size 48"):
        made(tiny_model(), config_groups={"w": group(4, 48)})


def test_targets_that_match_nothing_are_refused():
    with pytest.raises(RacError, match="its targets match none of the modules of this entry"):
        made(tiny_model(), config_groups={"w": group(4, 32, ["re:.*experts.*"])})


def test_codes_are_read_back_exactly_from_a_bfloat16_module():
    """Rounded in bfloat16, 65 * 1.0546875 would become another code."""
    model = tiny_model().bfloat16()
    quantizer = made(model, scheme="W8A8")
    quantizer.attach(model)
    module = model.model.layers[0].mlp.up_proj
    codes = torch.arange(-64, 64).repeat(64, 1).T.contiguous().clamp(-127, 127).float()[:, :64]
    scale = torch.full((128, 1), 1.0546875)
    for other in quantizer.grids:
        ones = torch.ones(other.weight.shape[0], 1)
        quantizer.store(other, other.weight.detach(), ones.bfloat16())
    quantizer.store(module, (codes * scale).bfloat16(), scale.bfloat16())
    assert torch.equal(module.weight_zero_point, torch.zeros_like(module.weight_zero_point))
    quantizer.finish(model)
    quantizer.compress()
    assert module.quantization_status == QuantizationStatus.COMPRESSED
    assert torch.equal(module.weight.float(), codes)
    quantizer.compress()  # a second save finds them compressed
    assert torch.equal(module.weight.float(), codes)


def test_zero_points_are_stored_and_packed():
    model = tiny_model()
    groups = {"w": group(2, 32)}
    groups["w"]["weights"]["symmetric"] = False
    quantizer = made(model, prunes=False, config_groups=groups)
    quantizer.attach(model)
    module = model.model.layers[0].mlp.up_proj  # [128, 64]
    generator = torch.Generator().manual_seed(0)
    codes, zeros = (
        torch.randint(-2, 2, shape, generator=generator) for shape in ((128, 64), (128, 2))
    )
    scale = torch.rand(128, 2, generator=generator) + 0.5
    weight = (codes - zeros.repeat_interleave(32, dim=1)) * scale.repeat_interleave(32, dim=1)
    for other in quantizer.grids:
        shape = other.weight_scale.shape
        quantizer.store(
            other, other.weight.detach(), torch.ones(shape), torch.zeros(shape, dtype=torch.int8)
        )
    quantizer.store(module, weight, scale, zeros.to(torch.int8))
    assert module.weight_zero_point.dtype == torch.int8
    quantizer.finish(model)
    quantizer.compress()
    assert module.weight_packed.shape == (128, 4)
    assert module.weight_zero_point.shape == (8, 2)
    words = module.weight_zero_point.to(torch.int64) & 0xFFFFFFFF
    assert [int(words[0, 1]) >> 2 * row & 3 for row in range(16)] == (zeros[:16, 1] + 2).tolist()
    decompress_module(module)
    assert torch.equal(module.weight, weight)


def test_zero_points_of_pruned_weights_are_refused_with_the_reason():
    groups = {"w": group(4, 32)}
    groups["w"]["weights"]["symmetric"] = False
    with pytest.raises(
        RacError,
        match=r"so a zero is its zero point, and sparse kernels take .* set symmetric: true",
    ):
        made(tiny_model(), config_groups=groups)


@pytest.mark.parametrize("bits", [2, 3, 5, 6, 7])
def test_other_integers_only_where_nothing_is_pruned(bits):
    assert {
        grid.bits
        for grid in made(
            tiny_model(), prunes=False, config_groups={"w": group(bits, 32)}
        ).grids.values()
    } == {bits}
    with pytest.raises(RacError, match=rf"int of {bits} bits, .* use int of 4 or 8 bits"):
        made(tiny_model(), config_groups={"w": group(bits, 32)})
