"""Activations of 8 bits: which layers of a folder, the rounding, the error of each layer, and the
choice."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from rac_modifier.errors import RacError
from rac_modifier.evaluation.activations import (
    LEVELS,
    _activation_block,
    _IntegerLayer,
    _layers_of_run,
    _measure_activations,
    rounded,
)
from rac_modifier.formats.encoding import Encoding
from rac_modifier.formats.stored_weight import all_stored
from rac_modifier.kernels import cpu
from rac_modifier.kernels.cpu.support import support
from tests.measure.test_divergence import sequences
from tests.tiny import tiny_model

DOWN = "model.layers.0.mlp.down_proj"
UP = "model.layers.0.mlp.up_proj"


def layer(module: str = DOWN, own_error: float = 0.1) -> _IntegerLayer:
    return _IntegerLayer(module, 48, own_error)


def test_the_layers_of_a_run():
    """Their blocks are the groups, at most 512 columns; others keep 16 bits."""
    grids = {
        UP: (Encoding("int", 4, 32), 64),
        DOWN: (Encoding("int", 3), 1056),
        "model.layers.0.mlp.gate_proj": (Encoding("int", 8), 64),
        # those below keep 16 bits: floats, experts, the vocabulary's, groups without a kernel
        "model.layers.1.mlp.up_proj": (Encoding("float", 8), 64),
        "model.layers.1.mlp.experts.0.up_proj": (Encoding("int", 4, 32), 64),
        "lm_head": (Encoding("int", 8), 64),
        "model.layers.2.mlp.up_proj": (Encoding("int", 4, 30), 60),
    }
    linears = {name: torch.nn.Linear(columns, 2) for name, (_, columns) in grids.items()}
    model = SimpleNamespace(get_submodule=linears.__getitem__)
    own_errors = dict.fromkeys(grids, 0.5)
    all_grids = {name: grid for name, (grid, _) in grids.items()}
    all_grids["not.measured"] = Encoding("int", 4, 32)
    layers = _layers_of_run(model, all_grids, own_errors)
    blocks = {x.module: (x.block, x.own_error) for x in layers}
    expected = {UP: 32, DOWN: 512, "model.layers.0.mlp.gate_proj": 64}
    assert blocks == {name: (block, 0.5) for name, block in expected.items()}


@pytest.mark.parametrize(
    ("encoding", "columns", "block"),
    [
        (Encoding("int", 4, 64), 256, 64),
        (Encoding("int", 4), 4096, 512),  # one scale per row
        (Encoding("int", 8, 340), 2040, 340),
        (Encoding("int", 4, 1024), 4096, None),
        (Encoding("int", 4, 30), 120, None),
        (Encoding("float", 8), 120, None),
    ],
)
def test_the_columns_that_share_a_scale_of_x(encoding, columns, block):
    assert _activation_block(encoding, columns) == block


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("columns", [48, 100])
def test_rounded_to_the_nearest_integer_of_its_block(bits, columns):
    x = torch.randn(3, columns, generator=torch.Generator().manual_seed(0))
    x[1, :48] = 0
    result = rounded(x, 48, bits)
    for first in range(0, columns, 48):
        part, got = (t[:, first : first + 48].double() for t in (x, result))
        step = part.abs().amax(1, keepdim=True) / LEVELS[bits]
        step[step == 0] = 1.0
        assert ((got / step) - (got / step).round()).abs().max() < 0.01
        assert ((got - part) / step).abs().max() < 0.51


def test_the_error_of_a_layer():
    """Against all matmuls in float64, for one sequence, with weights of 15 steps per row."""
    model = tiny_model()
    weight = model.get_submodule(DOWN).weight.data
    step = weight.abs().amax(1, keepdim=True) / 7
    weight.copy_((weight / step).round() * step)
    (ids, prompt), *_ = sequences()
    seen = []
    down = model.get_submodule(DOWN)
    handle = down.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]))
    handle.remove()
    after = weight.double().T
    eight, sixteen = (rounded(seen[0], 48, bits).double() @ after for bits in (8, 16))
    error = float((eight - sixteen).square().sum() / sixteen.square().sum())
    (measured,) = _measure_activations(model, [layer(own_error=0.25)], [(ids, prompt)])
    assert measured.error == pytest.approx(error, rel=1e-3)
    assert (measured.own_error, 1e-6 < error < 1e-3) == (0.25, True)
    assert not model.get_submodule(DOWN)._forward_pre_hooks


def test_the_limit_is_a_share_of_the_layers_own_error():
    layers = [_IntegerLayer("a", 48, 0.1, 5e-3), _IntegerLayer("b", 48, 0.4, 8e-3)]
    layers.append(_IntegerLayer("c", 48, 0.0, 1e-9))
    assert [layer.bits(0.01) for layer in layers] == [16, 16, 16]
    assert [layer.bits(0.03) for layer in layers] == [16, 8, 16]


def test_layers_that_cannot_be_measured():
    model = tiny_model()
    with pytest.raises(RacError, match=r"model\.layers\.7\.x: quantized in the checkpoint, but no"):
        _measure_activations(model, [layer("model.layers.7.x")], sequences())
    model.get_submodule(UP).weight.data[0] = float("inf")
    with pytest.raises(RacError, match=f"{DOWN}: activations are not finite"):
        _measure_activations(model, [layer()], sequences())


@pytest.mark.skipif(support().isa in (None, "portable"), reason=support().reason)
@pytest.mark.parametrize("tokens", [1, 33])
@pytest.mark.parametrize(("columns", "groups"), [(1024, 8), (768, 12), (600, 1)])
def test_the_kernels_round_so(columns, groups, tokens):
    """The difference is a small part of what rounding to 8 bits costs."""
    generator = torch.Generator().manual_seed(tokens)
    values = torch.randint(-7, 8, (37, columns), dtype=torch.int8, generator=generator)
    scale = torch.rand(37, groups, generator=generator) + 0.01
    stored = replace(all_stored(values, "w"), scale=scale, bits=4, activation_bits=8)
    x = torch.randn(tokens, columns, generator=generator)
    result = cpu.linear(x, cpu.pack(stored, torch.float32), 37, columns).double()
    block = _activation_block(Encoding("int", 4, columns // groups), columns)
    weight = stored.dequantized(torch.float32).double()
    eight = rounded(x, block, 8).double()
    shown = eight if support().multiplies_bytes else rounded(x, block, 16).double()
    assert (result - shown @ weight.T).norm() <= 0.05 * ((eight - x) @ weight.T).norm()
