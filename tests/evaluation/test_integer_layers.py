"""Which layers of a folder can be measured, and the reason of each that cannot; folders are made of a few small tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from rac_modifier.checkpoint.packing import pack_checkpoint
from rac_modifier.errors import RacError
from rac_modifier.evaluation.integer_layers import IntegerLayer, layers_of
from tests.tiny import linears, tiny_model

DOWN = "model.layers.0.mlp.down_proj"
UP = "model.layers.0.mlp.up_proj"
FP8 = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}


def words(
    rows: int, columns: int, group: int, bits: int = 4, order: bool = False
) -> dict[str, torch.Tensor]:
    tensors = {
        "weight_packed": torch.zeros(rows, -(-columns * bits // 32), dtype=torch.int32),
        "weight_scale": torch.ones(rows, columns // group, dtype=torch.bfloat16),
        "weight_shape": torch.tensor([rows, columns]),
    }
    return (
        {**tensors, "weight_g_idx": torch.zeros(columns, dtype=torch.int32)} if order else tensors
    )


def quantization(
    bits: int = 4, inputs: dict[str, Any] | None = None, **weights: Any
) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "strategy": "group", "group_size": 32, **weights}
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": inputs,
        "format": "pack-quantized",
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"g": group},
    }


def folder_of(
    folder: Path,
    modules: dict[str, dict[str, torch.Tensor]],
    own: dict[str, float] | None = None,
    **changes,
):
    """A folder with these modules, and a run record with these errors."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(
        json.dumps({"quantization_config": quantization(), **changes})
    )
    tensors = {
        f"{module}.{part}": tensor
        for module, parts in modules.items()
        for part, tensor in parts.items()
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    if own is not None:
        record = {
            "modules": [{"name": name, "relative_error": error} for name, error in own.items()]
        }
        (folder / "rac_run.json").write_text(json.dumps(record))
    return folder


def test_the_layers_of_a_dense_checkpoint(tmp_path: Path) -> None:
    modules = {
        UP: words(8, 64, 32),
        DOWN: words(8, 1056, 1056, bits=3),
        "model.layers.0.mlp.gate": words(8, 128, 64, bits=2),
        "model.layers.1.mlp.experts.0.up_proj": words(8, 64, 32),
        "model.layers.1.mlp.experts.1.up_proj": words(8, 64, 32),
        "model.layers.2.mlp.up_proj": words(8, 64, 32, bits=8),
        "model.layers.2.mlp.down_proj": words(8, 64, 64, order=True),
        "model.layers.3.mlp.up_proj": words(8, 60, 30),
        "model.layers.3.mlp.down_proj": words(8, 100, 33),
        "lm_head": words(8, 64, 32),
        "model.embed_tokens": words(8, 64, 32),
    }
    layers, left_out = layers_of(folder_of(tmp_path, modules), recorded=False)
    gate = ("model.layers.0.mlp.gate", 64, None)
    assert [(x.module, x.block, x.own_error) for x in layers] == [
        (DOWN, 512, None),
        gate,
        (UP, 32, None),
    ]
    assert left_out == {
        "heads and embeddings take 16 bits": 2,
        "routed experts take 16 bits": 2,
        "dense because its columns were reordered (actorder: group)": 1,
        "its 100 columns are no multiple of its groups of 33": 1,
        "the kernels multiply its values as floats": 1,
    }


def test_own_errors_come_from_the_run_record(tmp_path: Path) -> None:
    modules = {UP: words(8, 64, 32), DOWN: words(8, 64, 32)}
    folder = folder_of(tmp_path, modules, own={UP: 0.25, DOWN: 0.5})
    assert {layer.module: layer.own_error for layer in layers_of(folder)[0]} == {
        UP: 0.25,
        DOWN: 0.5,
    }
    folder_of(tmp_path, modules, own={UP: 0.25})
    with pytest.raises(
        RacError, match=rf"rac_run\.json has no error of {DOWN} \(1 layers in all\).*--dense MODEL"
    ):
        layers_of(folder)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"quantization_config": None},
            "its weights are neither quantized nor packed; give the folder",
        ),
        (
            {"quantization_config": {"quant_method": "bitsandbytes"}},
            "quantized by 'bitsandbytes', of which no layer",
        ),
        (
            {"quantization_config": quantization(bits=8)},
            r"\(its weights are int8: int8 in groups of 32 \(pack-q.*; give the",
        ),
        (
            {"quantization_config": quantization(inputs=FP8)},
            r"\(its activations are quantized too: int4 .*float8 per token",
        ),
        (
            {"quantization_config": quantization(strategy="tensor")},
            r"\(its scales are per tensor: ",
        ),
        (
            {"quantization_config": {"quant_method": "compressed-tensors"}},
            r"\(it quantizes no weights\); give the folder",
        ),
        (
            {},
            r"none of its layers may have activations of 8 bits \(lm_head: heads and embeddings take 16 bits\); quantize",
        ),
    ],
)
def test_a_checkpoint_that_is_refused(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    folder = folder_of(tmp_path, {"lm_head": words(8, 64, 32)}, **config)
    with pytest.raises(RacError, match=message):
        layers_of(folder)


def test_one_group_with_quantized_activations_is_refused_too(tmp_path: Path) -> None:
    """Which modules it quantizes is not known from the tensors."""
    both = quantization()
    both["config_groups"]["other"] = quantization(inputs=FP8)["config_groups"]["g"]
    with pytest.raises(RacError, match="its activations are quantized too"):
        layers_of(folder_of(tmp_path, {UP: words(8, 64, 32)}, quantization_config=both))


def test_no_folder_and_packed_floats_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        RacError, match=r"owner/name: no folder of a checkpoint; give .*hf download ID"
    ):
        layers_of(Path("owner/name"))
    model = tiny_model()
    for linear in linears(model).values():
        linear.weight.data.view(-1, 4)[:, :2] = 0
    model.save_pretrained(tmp_path)
    pack_checkpoint(tmp_path, dict.fromkeys(linears(model), "2:4"), dense_linears=["lm_head"])
    assert (
        "sparsity_config"
        in json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    )
    with pytest.raises(
        RacError,
        match=r"none of its layers .* the kernels multiply its values as floats\); quantize",
    ):
        layers_of(tmp_path)


@pytest.mark.parametrize(
    ("stored", "group", "columns", "bits", "block"),
    [
        (torch.int32, 64, 256, 4, 64),
        (torch.int32, 1024, 4096, 4, 512),
        (torch.int32, 4096, 4096, 4, 512),  # one scale per row
        (torch.int32, 1056, 2112, 4, 352),
        (torch.int32, 1280, 2560, 4, 320),  # thirds are no multiple of 8
        (torch.int32, 1056, 2112, 3, 352),
        (torch.int32, 640, 1280, 3, 320),
        (torch.int32, 1040, 2080, 3, 208),  # no multiple of 32, so four bits each, in fifths
        (torch.int8, 1020, 2040, 4, 340),
    ],
)
def test_the_columns_that_share_a_scale_of_x(stored, group, columns, bits, block):
    """The largest equal parts of a group that have at most 512 columns and a multiple of what the kernel takes at once."""
    assert IntegerLayer.of("a.b", stored, group, columns, None, word_bits=bits) == IntegerLayer(
        "a.b", block, None
    )


def test_values_that_are_multiplied_as_floats_and_experts_are_no_such_layers():
    assert IntegerLayer.of("a.b", torch.int32, 30, 120, None) is None
    assert IntegerLayer.of("a.b", torch.float8_e4m3fn, 120, 120, None) is None
    assert IntegerLayer.of("a.experts.3.up_proj", torch.int32, 32, 128, None) is None
