"""Activations of 8 bits: which layers of a folder, the rounding, the error of each layer, and the
choice."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from rac_modifier.errors import RacError
from rac_modifier.evaluation.activations import (
    LEVELS,
    IntegerLayer,
    activation_block,
    activations_table,
    check_original,
    choose_activations,
    layers_of,
    layers_of_run,
    measure_activations,
    rounded,
)
from rac_modifier.formats.grid import Grid
from rac_modifier.formats.stored_weight import all_stored
from rac_modifier.kernels import cpu
from rac_modifier.kernels.cpu.support import support
from tests.measure.test_divergence import sequences
from tests.tiny import tiny_model

DOWN = "model.layers.0.mlp.down_proj"
UP = "model.layers.0.mlp.up_proj"
FP8 = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}


def layer(module: str = DOWN, own_error: float | None = 0.1) -> IntegerLayer:
    return IntegerLayer(module, 48, own_error)


def words(rows: int, columns: int, group: int, bits: int = 4, order: bool = False):
    tensors = {
        "weight_packed": torch.zeros(rows, -(-columns * bits // 32), dtype=torch.int32),
        "weight_scale": torch.ones(rows, columns // group, dtype=torch.bfloat16),
        "weight_shape": torch.tensor([rows, columns]),
    }
    return tensors | ({"weight_g_idx": torch.zeros(columns, dtype=torch.int32)} if order else {})


def quantization(inputs: dict[str, Any] | None = None):
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
    form = {"format": "pack-quantized"}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, **form}
    return {"quant_method": "compressed-tensors", **form, "config_groups": {"g": group}}


def folder_of(folder: Path, modules, own: dict[str, float] | None = None, **config) -> Path:
    """A folder with these modules, and a run record with these errors."""
    config = {"quantization_config": quantization(), **config}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {f"{name}.{part}": t for name, parts in modules.items() for part, t in parts.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    if own is not None:
        modules = [{"name": name, "relative_error": error} for name, error in own.items()]
        (folder / "rac_run.json").write_text(json.dumps({"modules": modules}))
    return folder


def test_the_layers_of_a_run():
    """Their blocks are the groups, at most 512 columns; others keep 16 bits."""
    grids = {
        UP: (Grid("int", 4, 32), 64),
        DOWN: (Grid("int", 3), 1056),
        "model.layers.0.mlp.gate_proj": (Grid("int", 8), 64),
        # those below keep 16 bits: floats, experts, the vocabulary's, groups without a kernel
        "model.layers.1.mlp.up_proj": (Grid("float", 8), 64),
        "model.layers.1.mlp.experts.0.up_proj": (Grid("int", 4, 32), 64),
        "lm_head": (Grid("int", 8), 64),
        "model.layers.2.mlp.up_proj": (Grid("int", 4, 30), 60),
    }
    linears = {name: torch.nn.Linear(columns, 2) for name, (_, columns) in grids.items()}
    model = SimpleNamespace(get_submodule=linears.__getitem__)
    own_errors = dict.fromkeys(grids, 0.5)
    all_grids = {name: grid for name, (grid, _) in grids.items()}
    all_grids["not.measured"] = Grid("int", 4, 32)
    layers = layers_of_run(model, all_grids, own_errors)
    blocks = {x.module: (x.block, x.own_error) for x in layers}
    expected = {UP: 32, DOWN: 512, "model.layers.0.mlp.gate_proj": 64}
    assert blocks == {name: (block, 0.5) for name, block in expected.items()}


def test_the_layers_of_a_dense_checkpoint(tmp_path):
    modules = {
        UP: words(8, 64, 32),
        DOWN: words(8, 1056, 1056, bits=3),
        "model.layers.0.mlp.gate": words(8, 128, 64, bits=2),
        # those below keep 16 bits: experts, other bits, an order, odd groups, the vocabulary's
        "model.layers.1.mlp.experts.0.up_proj": words(8, 64, 32),
        "model.layers.2.mlp.up_proj": words(8, 64, 32, bits=8),
        "model.layers.2.mlp.down_proj": words(8, 64, 64, order=True),
        "model.layers.3.mlp.up_proj": words(8, 60, 30),
        "lm_head": words(8, 64, 32),
        "model.embed_tokens": words(8, 64, 32),
    }
    every = quantization()
    for bits in (2, 3, 8):
        group = {"weights": {"num_bits": bits}, "format": "pack-quantized"}
        every["config_groups"][f"g{bits}"] = group
    layers = layers_of(folder_of(tmp_path, modules, quantization_config=every), recorded=False)
    gate = ("model.layers.0.mlp.gate", 64, None)
    actual = [(x.module, x.block, x.own_error) for x in layers]
    assert actual == [(DOWN, 512, None), gate, (UP, 32, None)]


def test_own_errors_come_from_the_run_record(tmp_path):
    modules = {UP: words(8, 64, 32), DOWN: words(8, 64, 32)}
    folder = folder_of(tmp_path, modules, own={UP: 0.25, DOWN: 0.5})
    assert {x.module: x.own_error for x in layers_of(folder)} == {UP: 0.25, DOWN: 0.5}
    folder_of(tmp_path, modules, own={UP: 0.25})
    with pytest.raises(RacError, match=rf"no error of {DOWN} \(1 in all\).*--dense MODEL"):
        layers_of(folder)


def test_checkpoints_without_such_layers_are_refused(tmp_path):
    with pytest.raises(RacError, match=r"owner/name: no such folder; .*hf download ID"):
        layers_of(Path("owner/name"))
    head = {"lm_head": words(8, 64, 32)}
    with pytest.raises(RacError, match="multiply none of its layers as integers"):
        layers_of(folder_of(tmp_path, head))
    with pytest.raises(RacError, match="its activations are quantized already"):
        layers_of(folder_of(tmp_path, head, quantization_config=quantization(inputs=FP8)))
    entries = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True}
    with pytest.raises(RacError, match="the format gptq has no place for the choice"):
        layers_of(folder_of(tmp_path, head, quantization_config=entries))


@pytest.mark.parametrize(
    ("stored", "group", "columns", "bits", "block"),
    [
        (torch.int32, 64, 256, 4, 64),
        (torch.int32, 4096, 4096, 4, 512),  # one scale per row
        (torch.int8, 340, 2040, 4, 340),
        (torch.int32, 1024, 4096, 4, None),
        (torch.int32, 30, 120, 4, None),
        (torch.float8_e4m3fn, 120, 120, 4, None),
    ],
)
def test_the_columns_that_share_a_scale_of_x(stored, group, columns, bits, block):
    assert activation_block(stored, group, columns, bits) == block


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


def original_and_rounded():
    """A model, and another whose `DOWN` is rounded to 15 steps per row."""
    dense, model = tiny_model(), tiny_model()
    weight = model.get_submodule(DOWN).weight.data
    step = weight.abs().amax(1, keepdim=True) / 7
    weight.copy_((weight / step).round() * step)
    return dense, model


def test_the_errors_of_a_layer():
    """Against all matmuls in float64, for one sequence; a known own error is kept."""
    dense, model = original_and_rounded()
    (ids, prompt), *_ = sequences()
    seen = []
    down = model.get_submodule(DOWN)
    handle = down.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]))
    handle.remove()
    before, after = (m.get_submodule(DOWN).weight.detach().double().T for m in (dense, model))
    x = seen[0].double()
    eight, sixteen = (rounded(seen[0], 48, bits).double() @ after for bits in (8, 16))
    error = float((eight - sixteen).square().sum() / sixteen.square().sum())
    own = float((x @ (before - after)).square().sum() / (x @ before).square().sum())
    check_original(model, dense, [layer()])
    (unknown,) = measure_activations(model, [layer(own_error=None)], [(ids, prompt)], dense)
    assert unknown.error == pytest.approx(error, rel=1e-3)
    assert unknown.own_error == pytest.approx(own, rel=1e-3)
    assert 1e-6 < error < 1e-3 < own < 0.1
    (known,) = measure_activations(model, [layer(own_error=0.25)], [(ids, prompt)], dense)
    assert (known.own_error, known.error) == (0.25, unknown.error)
    assert not model.get_submodule(DOWN)._forward_pre_hooks


def test_the_limit_is_a_share_of_the_layers_own_error():
    layers = [IntegerLayer("a", 48, 0.1, 5e-3), IntegerLayer("b", 48, 0.4, 8e-3)]
    layers.append(IntegerLayer("c", 48, 0.0, 1e-9))
    assert [layer.bits(0.01) for layer in layers] == [16, 16, 16]
    assert [layer.bits(0.03) for layer in layers] == [16, 8, 16]


def test_the_divergence_is_that_of_rounded_inputs_of_the_chosen_layers_alone():
    model = tiny_model()
    chosen = choose_activations(model, [layer(own_error=1.0), layer(UP, 1e-9)], sequences(), 0.1)
    assert {name: row["bits"] for name, row in chosen["layers"].items()} == {DOWN: 8, UP: 16}
    assert 0 < chosen["kl"] < 1e-2
    assert [row[-1] for row in activations_table(chosen).rows] == ["8", "16"]
    assert activations_table(chosen).note.startswith("1 of 2 layers in 8 bits, where these add")
    none = choose_activations(model, [layer(UP, 1e-9)], sequences(), 0.1)
    assert none["kl"] == pytest.approx(0.0, abs=1e-9)
    assert not model.get_submodule(DOWN)._forward_pre_hooks


def test_layers_that_cannot_be_measured():
    model = tiny_model()
    with pytest.raises(RacError, match=r"model\.layers\.7\.x: quantized in the checkpoint, but no"):
        measure_activations(model, [layer("model.layers.7.x")], sequences())
    model.get_submodule(UP).weight.data[0] = float("inf")
    with pytest.raises(RacError, match=f"{DOWN}: activations are not finite"):
        measure_activations(model, [layer()], sequences())


@pytest.mark.parametrize("change", ["norm", "shape", "missing", "quantized"])
def test_a_dense_model_that_own_errors_cannot_be_measured_against(change):
    dense, model = original_and_rounded()
    message = rf"{DOWN}: no layer \[64, 128\] in the dense model; name what"
    if change == "norm":
        dense.get_submodule("model.layers.0.post_attention_layernorm").weight.data[3] *= 1.1
        message = r"model\.layers\.0\.post_attention_layernorm\.weight: differs .*\(as by AWQ\)"
    elif change == "shape":
        dense = tiny_model(intermediate_size=256)
    elif change == "missing":
        dense.get_submodule("model.layers.0.mlp").down_proj = torch.nn.Identity()
    else:
        dense.get_submodule(DOWN).quantization_scheme = object()
    with pytest.raises(RacError, match=f"^{message}"):
        check_original(model, dense, [layer(own_error=None)])


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
    block = activation_block(torch.int32, columns // groups, columns)
    weight = stored.dequantized(torch.float32).double()
    eight = rounded(x, block, 8).double()
    shown = eight if support().multiplies_bytes else rounded(x, block, 16).double()
    assert (result - shown @ weight.T).norm() <= 0.05 * ((eight - x) @ weight.T).norm()
