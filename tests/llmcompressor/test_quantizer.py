"""Schemes on the modules that are pruned, how codes are stored, and 8-bit activations."""

import pytest
import torch
from compressed_tensors.quantization import QuantizationStatus

from rac_modifier import RacError
from rac_modifier.llmcompressor.quantizer import Quantizer
from rac_modifier.settings.pruning import QuantizationSettings
from tests.llmcompressor.modifier_helpers import int4
from tests.tiny import linears, tiny_model


def made(model, prunes=True, **settings) -> Quantizer:
    names = {m: n for n, m in linears(model).items()}
    return Quantizer(QuantizationSettings(**settings), model, names, prunes=prunes)


def test_a_scheme_covers_the_modules_that_its_targets_match():
    model = tiny_model()
    every = made(model, scheme="W8A8")
    assert set(every.grids) == set(linears(model).values())
    every.attach(model)
    assert not hasattr(model.lm_head, "quantization_scheme")
    some = made(tiny_model(), **int4(targets=(r"re:.*mlp.*",)))
    assert set(some.described) == {name for name in linears(model) if ".mlp." in name}
    assert all(grid.bits == 4 and grid.group_size == 32 for grid in some.grids.values())
    assert Quantizer(None, model, {}, prunes=True).grids == {}


def uneven():
    groups = int4()
    groups["config_groups"]["group_0"]["weights"]["group_size"] = 48
    return groups


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (uneven(), "q_proj: 64 inputs are no multiple of group_size 48"),
        (int4(targets=("re:.*experts.*",)), "targets match no module of this entry"),
        (int4(symmetric=False), "which no kernel multiplies with a mask .* set symm"),
        (
            {"scheme": "NVFP4A16"},
            r"weights float4 in groups of 16.* cannot .* use int of 4 or 8 bits",
        ),
        *((int4(bits), rf"weights int{bits} .* use int of 4 or 8 bits") for bits in (2, 3, 5, 7)),
    ],
)
def test_what_cannot_be_rounded_is_refused(settings, says):
    with pytest.raises(RacError, match=says):
        made(tiny_model(), **settings)


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
    for _ in range(2):  # a second save meets them compressed
        quantizer.compress()
        assert module.quantization_status == QuantizationStatus.COMPRESSED
        assert torch.equal(module.weight.float(), codes)
