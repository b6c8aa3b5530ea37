"""Schemes on the modules that are pruned, how codes are stored, and 8-bit activations."""

from typing import Any

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
    other = made(tiny_model(), scheme="w4a16", group_size=16)
    assert {(grid.bits, grid.group_size) for grid in other.grids.values()} == {(4, 16)}
    assert Quantizer(None, model, {}, prunes=True).grids == {}


@pytest.mark.parametrize("scheme", ["W8A8", "NVFP4A16"])
def test_no_scale_is_uninitialized_memory(scheme, request):
    """A killed run is known by a hash of all parameters. Deterministic torch.empty holds NaN."""
    request.addfinalizer(lambda: torch.use_deterministic_algorithms(False))
    torch.use_deterministic_algorithms(True)
    model = tiny_model()
    made(model, prunes=False, scheme=scheme).attach(model)
    scales = {n: p for n, p in model.named_parameters() if n.endswith("_scale")}
    assert len(scales) >= len(linears(model))
    assert not any(scale.float().count_nonzero() for scale in scales.values())


def uneven():
    groups = int4()
    groups["config_groups"]["group_0"]["weights"]["group_size"] = 48
    return groups


def two_groups(*targets: str) -> dict[str, Any]:
    """int8 for all linear layers, and int4 for `targets`, before or behind it."""
    eight, four = (int4(bits)["config_groups"]["group_0"] for bits in (8, 4))
    return {"config_groups": {"rest": eight, "special": {**four, "targets": [*targets]}}}


@pytest.mark.parametrize("last", [True, False])
def test_of_two_groups_the_more_specific_target_counts_in_any_order(last):
    """As in compressed-tensors, which stores what was rounded."""
    settings = two_groups("re:.*up_proj$", "model.layers.0.mlp.down_proj")
    if not last:
        settings["config_groups"] = dict(reversed(settings["config_groups"].items()))
    model = tiny_model()
    quantizer = made(model, **settings)
    quantizer.attach(model)
    names = {module: name for name, module in model.named_modules()}
    bits = {names[module]: grid.bits for module, grid in quantizer.grids.items()}
    assert [name for name, of in bits.items() if of == 4] == [
        "model.layers.0.mlp.up_proj",
        "model.layers.0.mlp.down_proj",
        "model.layers.1.mlp.up_proj",
    ]
    for name, module in linears(model).items():
        assert module.quantization_scheme.weights.num_bits == bits[name]


def test_a_target_that_matches_the_embedding_too_leaves_it_dense():
    model = tiny_model()
    made(model, **int4(targets=("re:model.*",))).attach(model)
    assert not hasattr(model.model.embed_tokens, "quantization_scheme")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (uneven(), "no multiple of group_size 48; set quantization.group_size=16"),
        ({"scheme": "W8A8", "group_size": 32}, "group_size: 32 has no effect on W8A8"),
        (int4(targets=("re:.*experts.*",)), "the target 're:.*experts.*' matches no module of"),
        (two_groups("re:.*down_porj$"), "the target 're:.*down_porj.' matches no module of"),
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
        other.weight_scale.data.fill_(1.0)
        other.weight_zero_point.data.zero_()
    module.weight.data.copy_(codes * scale)
    module.weight_scale.data.copy_(scale)
    quantizer.finish(model)
    for _ in range(2):  # a second save meets them compressed
        quantizer.compress()
        assert module.quantization_status == QuantizationStatus.COMPRESSED
        assert torch.equal(module.weight.float(), codes)
