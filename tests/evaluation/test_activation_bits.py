"""What 8 bits for the inputs of a layer cost: the rounding, the error of each layer, and the model with rounded inputs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rac_modifier.checkpoint.packing import pack_checkpoint
from rac_modifier.errors import RacError
from rac_modifier.evaluation.activation_bits import (
    LEVELS,
    ActivationError,
    QuantizedLayer,
    activation_table,
    measure_activations,
    quantized_layers,
    rounded,
    rounded_inputs,
)
from tests.evaluation.test_dense_reference import sequences
from tests.tiny import linears, tiny_model

DOWN = "model.layers.0.mlp.down_proj"


def layer(module: str = DOWN, own_error: float = 0.1) -> QuantizedLayer:
    return QuantizedLayer(module, 48, own_error)


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
                (part / step).tolist(), (found[row, first : first + 48] / step).tolist(), strict=True
            ):
                assert abs(got - round(got)) < 0.01
                assert abs(got - value) < 0.51


def test_the_error_of_a_layer():
    """Against the two products, all in float64, for one sequence."""
    model = tiny_model()
    (ids, prompt), *_ = sequences()
    seen = []
    handle = model.get_submodule(DOWN).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]))
    handle.remove()
    weight = model.get_submodule(DOWN).weight.detach().double()
    eight, sixteen = (rounded(seen[0], 48, bits).double() @ weight.T for bits in (8, 16))
    (found,) = measure_activations(model, [layer()], [(ids, prompt)])
    assert found.error == pytest.approx(float((eight - sixteen).square().sum() / sixteen.square().sum()), rel=1e-3)
    assert 1e-6 < found.error < 1e-3
    assert not model.get_submodule(DOWN)._forward_pre_hooks


def test_an_outlier_channel_needs_16_bits():
    """A channel x1000 of which the layer hardly makes use: what the others lose is all of the output."""
    model = tiny_model()
    up, down = (model.get_submodule(f"model.layers.0.mlp.{name}") for name in ("up_proj", "down_proj"))
    errors = []
    for _ in range(2):
        errors.append(measure_activations(model, [layer()], sequences())[0])
        up.weight.data[5] *= 1000
        down.weight.data[:, 5] *= 1e-4
    assert errors[0].loses_nothing(0.01)
    assert not errors[1].loses_nothing(0.01)
    assert errors[1].error > 100 * errors[0].error
    table = activation_table(errors, 0.01)
    assert [row[-1] for row in table.rows] == ["8", "16"]
    assert "at most 0.01 of the layer's own error" in table.note


def test_the_limit_is_a_share_of_the_layers_own_error():
    assert ActivationError(layer(own_error=0.1), 1e-3).loses_nothing(0.01)
    assert not ActivationError(layer(own_error=0.1), 1.1e-3).loses_nothing(0.01)
    assert not ActivationError(layer(own_error=0.0), 1e-9).loses_nothing(0.01)


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
    assert all((rounded(x, 48, 8) - x).norm() > 1e-3 * x.norm() for name, x in seen.items() if name != DOWN)
    assert steps[DOWN] <= 48


def test_activations_that_are_not_finite_are_refused():
    model = tiny_model()
    model.get_submodule("model.layers.0.mlp.up_proj").weight.data[0] = float("inf")
    with pytest.raises(RacError, match=f"{DOWN}: its activations are not finite"):
        measure_activations(model, [layer()], sequences())


def test_a_layer_that_the_model_does_not_have_is_refused():
    with pytest.raises(RacError, match=r"model\.layers\.7\.x: packed in the checkpoint, but no layer of this model"):
        measure_activations(tiny_model(), [layer("model.layers.7.x")], sequences())


def test_what_has_no_quantized_layers_is_refused(tmp_path: Path):
    with pytest.raises(RacError, match=r"no folder of a packed checkpoint; pack the model first"):
        quantized_layers(tmp_path)
    model = tiny_model()
    for linear in linears(model).values():
        linear.weight.data.view(-1, 4)[:, :2] = 0
    model.save_pretrained(tmp_path)
    with pytest.raises(RacError, match="no folder of a packed checkpoint"):
        quantized_layers(tmp_path)
    pack_checkpoint(tmp_path, dict.fromkeys(linears(model), "2:4"), dense_linears=["lm_head"])
    assert "sparsity_config" in json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    with pytest.raises(RacError, match="none of its packed weights is int8 or int4"):
        quantized_layers(tmp_path)
