"""What 8 bits for the inputs of a layer cost: the rounding, the error of each layer, and the model with rounded inputs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rac_modifier.checkpoint.stored_weight import all_stored
from rac_modifier.errors import RacError
from rac_modifier.evaluation.activations import (
    LEVELS,
    ActivationChoice,
    check_original,
    measure_activations,
    rounded,
    rounded_inputs,
)
from rac_modifier.evaluation.integer_layers import IntegerLayer
from rac_modifier.kernels import cpu
from rac_modifier.kernels.cpu.support import support
from tests.evaluation.test_dense_reference import sequences
from tests.tiny import linears, tiny_model

DOWN = "model.layers.0.mlp.down_proj"


def layer(module: str = DOWN, own_error: float = 0.1) -> IntegerLayer:
    return IntegerLayer(module, 48, own_error)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("columns", [48, 100, 512])
def test_rounded_to_the_nearest_integer_of_its_block(bits, columns):
    x = torch.randn(3, columns, generator=torch.Generator().manual_seed(0))
    x[1, :48] = 0
    found = rounded(x, 48, bits)
    for row in range(3):
        for first in range(0, columns, 48):
            part = x[row, first : first + 48].double()
            step = float(part.abs().max()) / LEVELS[bits] or 1.0
            for value, got in zip(
                (part / step).tolist(),
                (found[row, first : first + 48] / step).tolist(),
                strict=True,
            ):
                assert abs(got - round(got)) < 0.01
                assert abs(got - value) < 0.51


def test_the_error_of_a_layer():
    """Against the two products, all in float64, for one sequence."""
    model = tiny_model()
    (ids, prompt), *_ = sequences()
    seen = []
    handle = model.get_submodule(DOWN).register_forward_pre_hook(
        lambda module, args: seen.append(args[0])
    )
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]))
    handle.remove()
    weight = model.get_submodule(DOWN).weight.detach().double()
    eight, sixteen = (rounded(seen[0], 48, bits).double() @ weight.T for bits in (8, 16))
    (found,) = measure_activations(model, [layer()], [(ids, prompt)])
    assert found.error == pytest.approx(
        float((eight - sixteen).square().sum() / sixteen.square().sum()), rel=1e-3
    )
    assert 1e-6 < found.error < 1e-3
    assert not model.get_submodule(DOWN)._forward_pre_hooks


def test_an_outlier_channel_needs_16_bits():
    """A channel x1000 of which the layer hardly makes use: what the others lose is all of the output."""
    model = tiny_model()
    up, down = (
        model.get_submodule(f"model.layers.0.mlp.{name}") for name in ("up_proj", "down_proj")
    )
    errors = []
    for _ in range(2):
        errors.append(measure_activations(model, [layer()], sequences())[0])
        up.weight.data[5] *= 1000
        down.weight.data[:, 5] *= 1e-4
    assert errors[0].share <= 0.01 < errors[1].share
    assert errors[1].error > 100 * errors[0].error
    table = ActivationChoice(0.01, tuple(errors), {}).table()
    assert [row[-1] for row in table.rows] == ["8", "16"]
    assert "at most 0.01 of the layer's own error" in table.note


def test_the_limit_is_a_share_of_the_layers_own_error():
    layers = tuple(
        IntegerLayer(name, 48, own, error)
        for name, own, error in (("a", 0.1, 5e-3), ("b", 0.4, 8e-3), ("c", 0.0, 1e-9))
    )
    divergence = {"kl": 1e-6, "agreement": 1.0, "tokens": 9}
    assert ActivationChoice(0.01, layers, divergence).describe() == (
        "0 of 3 layers in 8 bits: 8 bits add at least 0.02 of a layer's own error, and the limit is "
        "0.01; a larger --limit takes more layers"
    )
    choice = ActivationChoice(0.03, layers, divergence)
    assert choice.modules == ["b"]
    assert choice.describe().startswith("1 of 3 layers in 8 bits: KL 1.00e-06 nats")


def test_the_inputs_of_these_layers_are_rounded_and_of_no_others():
    model = tiny_model()
    seen = {}
    names = [name for name in linears(model) if name.endswith(("down_proj", "o_proj"))]
    with torch.no_grad(), rounded_inputs(model, [layer()]):
        for name in names:
            model.get_submodule(name).register_forward_pre_hook(
                lambda module, args, name=name: seen.update({name: args[0]})
            )
        model(input_ids=torch.tensor([sequences()[0][0]]))
    steps = {name: len(torch.unique(x[0, 3, :48].abs())) for name, x in seen.items()}
    torch.testing.assert_close(rounded(seen[DOWN], 48, 8), seen[DOWN])
    assert all(
        (rounded(x, 48, 8) - x).norm() > 1e-3 * x.norm() for name, x in seen.items() if name != DOWN
    )
    assert steps[DOWN] <= 48


def test_activations_that_are_not_finite_are_refused():
    model = tiny_model()
    model.get_submodule("model.layers.0.mlp.up_proj").weight.data[0] = float("inf")
    with pytest.raises(RacError, match=f"{DOWN}: its activations are not finite"):
        measure_activations(model, [layer()], sequences())


def test_a_layer_that_the_model_does_not_have_is_refused():
    with pytest.raises(
        RacError, match=r"model\.layers\.7\.x: quantized in the checkpoint, but no layer of"
    ):
        measure_activations(tiny_model(), [layer("model.layers.7.x")], sequences())


def original_and_rounded():
    """A model, and one whose `DOWN` is another: rounded to 15 steps per row."""
    dense, model = tiny_model(), tiny_model()
    weight = model.get_submodule(DOWN).weight.data
    step = weight.abs().amax(1, keepdim=True) / 7
    weight.copy_((weight / step).round() * step)
    return dense, model


def test_an_own_error_that_is_not_known_is_measured():
    """Against both products in float64; a known one is kept."""
    dense, model = original_and_rounded()
    (ids, prompt), *_ = sequences()
    seen = []
    handle = model.get_submodule(DOWN).register_forward_pre_hook(
        lambda module, args: seen.append(args[0].double())
    )
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]))
    handle.remove()
    before, after = (m.get_submodule(DOWN).weight.detach().double() for m in (dense, model))
    expected = float(
        (seen[0] @ (before - after).T).square().sum() / (seen[0] @ before.T).square().sum()
    )
    unknown = replace(layer(), own_error=None)
    check_original(model, dense, [unknown])
    (found,) = measure_activations(model, [unknown], [(ids, prompt)], dense)
    assert found.own_error == pytest.approx(expected, rel=1e-3)
    assert 1e-4 < expected < 0.1
    assert found.error == measure_activations(model, [layer()], [(ids, prompt)])[0].error
    (kept,) = measure_activations(model, [layer(own_error=0.25)], [(ids, prompt)], dense)
    assert kept.own_error == 0.25


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "norm",
            r"model\.layers\.0\.post_attention_layernorm\.weight: differs .*rescaled before they were rounded \(as by AWQ\)",
        ),
        (
            "shape",
            rf"{DOWN}: \[64, 128\] here and \[64, 256\] in the dense model; name the model that was quantized",
        ),
        ("missing", rf"{DOWN}: \[64, 128\] here and no linear layer in the dense model"),
        (
            "quantized",
            rf"{DOWN}: quantized in the dense model too; name the model that was quantized",
        ),
    ],
)
def test_what_own_errors_cannot_be_measured_against(change, message):
    dense, model = original_and_rounded()
    if change == "norm":
        dense.get_submodule("model.layers.0.post_attention_layernorm").weight.data[3] *= 1.1
    elif change == "shape":
        dense = tiny_model(intermediate_size=256)
    elif change == "missing":
        dense.get_submodule("model.layers.0.mlp").down_proj = torch.nn.Identity()
    else:
        dense.get_submodule(DOWN).quantization_scheme = object()
    with pytest.raises(RacError, match=f"^{message}"):
        check_original(model, dense, [replace(layer(), own_error=None)])


@pytest.mark.skipif(support().isa in (None, "portable"), reason=support().reason)
@pytest.mark.parametrize("tokens", [1, 9, 33])
@pytest.mark.parametrize(("columns", "groups"), [(1024, 8), (768, 12), (600, 1)])
def test_the_kernels_round_so(columns, groups, tokens):
    """The difference is a small part of what rounding to 8 bits costs."""
    generator = torch.Generator().manual_seed(tokens)
    values = torch.randint(-7, 8, (37, columns), dtype=torch.int8, generator=generator)
    scale = torch.rand(37, groups, generator=generator) + 0.01
    stored = replace(all_stored(values, "w"), scale=scale, bits=4, activation_bits=8)
    x = torch.randn(tokens, columns, generator=generator)
    result = cpu.linear(x, cpu.pack(stored, torch.float32), 37, columns).double()
    layer = IntegerLayer.of("w", torch.int32, columns // groups, columns, None)
    weight = stored.dequantized(torch.float32).double()
    eight = rounded(x, layer.block, 8).double()
    shown = eight if support().multiplies_bytes else rounded(x, layer.block, 16).double()
    assert (result - shown @ weight.T).norm() <= 0.05 * ((eight - x) @ weight.T).norm()
