from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rac_modifier.checkpoint.inspect import inspect_checkpoint
from rac_modifier.checkpoint.packing import mark_dense, pack_checkpoint
from rac_modifier.errors import RacError
from tests.checkpoint.checkpoint_helpers import (
    Q,
    edited,
    edited_config,
    save_quantized,
    write,
)
from tests.checkpoint.gptq_awq_tensors import awq, drawn, gptq


def total_bytes(folder: Path) -> int:
    return sum(t.nbytes for file in folder.glob("*.safetensors") for t in load_file(file).values())


@pytest.mark.parametrize(("structure", "shard"), [("2:4", None), ("unstructured", "60KB")])
def test_packed(saved, structure, shard):
    folder, expected, modules = saved(structure, shard=shard)
    visited: list[str] = []
    report = inspect_checkpoint(folder, lambda weight: visited.append(weight.name))
    assert report.format == ("sparse-24-bitmask" if structure == "2:4" else "sparse-bitmask")
    assert {row.name for row in report.sparse} == set(modules) == set(visited)
    rows = {row.name: row for row in report.modules}
    for name in modules:
        weight, row = expected[f"{name}.weight"], rows[name]
        assert (row.rows, row.columns, row.dtype) == (*weight.shape, "BF16")
        assert row.sparsity == float((weight == 0).double().mean())
        assert (row.structure, row.dense_bytes, row.problem) == (structure, weight.nbytes, None)
        kept = weight.numel() // 2 if structure == "2:4" else int((weight != 0).sum())
        offsets = 0 if structure == "2:4" else 8 * len(weight)
        mask = len(weight) * -(-weight.shape[1] // 8)
        assert row.stored_bytes == 2 * kept + mask + offsets + 16
    assert rows["model.layers.0.self_attn.o_proj"].stored == "dense"
    assert report.sound
    assert report.stored_bytes == total_bytes(folder)
    assert report.dense_bytes == sum(t.nbytes for n, t in expected.items() if n != "lm_head.weight")


def test_dense_marked_and_a_pattern_that_broke_later(saved):
    folder, _, modules = saved(packed=False)
    mark_dense(folder, modules)
    report = inspect_checkpoint(folder)
    assert (report.format, report.sound) == ("dense", True)
    assert {row.name for row in report.sparse} == set(modules)
    assert report.sparsity == pytest.approx(0.5)
    with edited(folder) as tensors:
        tensors[f"{Q}.weight"][0, :4] = 1
    with edited_config(folder) as config:
        config["rac_sparsity"]["modules"] = {Q: "2:4"}
    problems = {row.name: row.problem for row in inspect_checkpoint(folder).modules if row.problem}
    assert problems == {Q: "1 groups break 2:4"}
    with edited_config(folder) as config:
        config["rac_sparsity"]["modules"] = {Q: "9:4"}
    with pytest.raises(RacError, match=f'{Q}: mask_structure "9:4": prunes 9 of every 4'):
        inspect_checkpoint(folder)


def test_a_damaged_module_is_one_bad_row(saved):
    folder, _, modules = saved()
    with edited(folder) as tensors:
        del tensors[f"{Q}.bitmask"]
    report = inspect_checkpoint(folder)
    assert [row.name for row in report.modules if row.problem] == [Q]
    assert len(report.sparse) == len(modules)
    (problem,) = [row.problem for row in report.modules if row.problem]
    assert problem.startswith(f"{Q}.bitmask: missing")
    assert report.stored_bytes == total_bytes(folder)


def test_layouts_whose_zeros_are_not_counted(tmp_path):
    tensors = {
        "a.weight_packed": torch.zeros(4, 4, dtype=torch.int32),
        "a.weight_scale": torch.ones(4, 1),
        "b.weight": torch.zeros(4, 4, dtype=torch.float8_e4m3fn),
        "c.weight": torch.zeros(4, 4, dtype=torch.float64),
        # 3 bits: 32 codes in 3 words per row; a zero weight is stored as its zero point
        "d.weight_packed": torch.zeros(4, 3, dtype=torch.int32),
        "d.weight_shape": torch.tensor([4, 32]),
        "d.weight_scale": torch.ones(4, 1),
        "d.weight_zero_point": torch.zeros(1, 1, dtype=torch.int32),
        "norm.weight": torch.ones(4),
    }
    weights = {"num_bits": 3, "strategy": "channel", "symmetric": False}
    config = {"format": "pack-quantized", "config_groups": {"w": {"weights": weights}}}
    write(tmp_path, tensors, quantization_config=config)
    report = inspect_checkpoint(tmp_path)
    assert [(row.name, row.stored, row.dtype, row.sparsity) for row in report.modules] == [
        ("a", "words", "I32", None),
        ("b", "dense", "F8_E4M3", 1.0),
        ("c", "dense", "F64", None),
        ("d", "words", "I3", None),
    ]
    d = report.modules[-1]
    assert (d.rows, d.columns, d.stored_bytes) == (4, 32, 48 + 16 + 16 + 4)
    assert report.stored_bytes == sum(tensor.nbytes for tensor in tensors.values())


def test_nvfp4_has_the_shape_of_its_weight(tmp_path):
    tensors = {
        "a.weight_packed": torch.zeros(4, 32, dtype=torch.uint8),
        "a.weight_scale": torch.ones(4, 4).to(torch.float8_e4m3fn),
        "a.weight_global_scale": torch.ones(1),
    }
    weights = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    config = {"format": "nvfp4-pack-quantized", "config_groups": {"w": {"weights": weights}}}
    write(tmp_path, tensors, quantization_config=config)
    (row,) = inspect_checkpoint(tmp_path).modules
    assert (row.rows, row.columns, row.dtype, row.sparsity) == (4, 64, "F4", None)
    assert row.problem is None


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_modules_of_gptq_and_awq_have_their_shape_zeros_and_bytes(tmp_path, method):
    """A code of zero is a zero, also where its scale is not 1."""
    weight = drawn(16, 64, 32, symmetric=True)
    tensors = gptq(weight) if method == "gptq" else awq(weight)
    named = {f"a.{part}": tensor for part, tensor in tensors.items()}
    entries = {"bits": 4, "group_size": 32, "sym": True, "zero_point": False}
    write(tmp_path, named, quantization_config={"quant_method": method, **entries})
    report = inspect_checkpoint(tmp_path)
    (row,) = report.modules
    assert (report.format, row.stored, row.dtype) == (method, method, "I4")
    assert (row.rows, row.columns) == (16, 64)
    assert row.sparsity == float((weight.meant == 0).float().mean())
    assert row.stored_bytes == sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize("quantization", ["gptq", {"quant_method": ["gptq"]}, None])
def test_a_method_that_is_no_text_is_no_format(tmp_path, quantization):
    write(tmp_path, {"a.weight": torch.ones(2, 2)}, quantization_config=quantization)
    assert inspect_checkpoint(tmp_path).format == "dense"


@pytest.mark.parametrize(("scheme", "dtype", "per_weight"), [("w4", "I4", 0.5), ("w8", "I8", 1.0)])
def test_a_quantized_packed_weight_is_compared_with_its_dense_codes(
    tmp_path, scheme, dtype, per_weight
):
    """Half a byte per int4 weight and the scales is what it would take without the zeros' mask."""
    modules = save_quantized(tmp_path, "unstructured", scheme)
    before = load_file(tmp_path / "model.safetensors")
    pack_checkpoint(tmp_path, modules, ["lm_head"])
    rows = {row.name: row for row in inspect_checkpoint(tmp_path).modules}
    for name in modules:
        scales = before[f"{name}.weight_scale"].nbytes
        assert rows[name].dtype == dtype
        assert rows[name].dense_bytes == rows[name].rows * rows[name].columns * per_weight + scales


def test_names_with_digits_that_are_no_numbers(tmp_path):
    names = ["layers.\u00b2", "layers." + "9" * 19, "layers.10", "layers.9"]
    write(tmp_path, {f"{name}.weight": torch.ones(2, 2) for name in names})
    rows = [row.name for row in inspect_checkpoint(tmp_path).modules]
    assert rows == [names[index] for index in (0, 3, 2, 1)]


@pytest.mark.parametrize(
    ("name", "index", "value"),
    [
        ("a.weight_packed", None, None),
        ("a.weight_scale", 0, 0.0),
        ("a.weight_scale", 1, float("nan")),
        ("b.weight", 3, float("inf")),
    ],
)
def test_a_damaged_dense_matrix_is_named(tmp_path, name, index, value):
    """A shape of 2^62, scales of zero or NaN, and values that are not finite."""
    tensors = {
        "a.weight_packed": torch.zeros(4, 4, dtype=torch.int32),
        "a.weight_shape": torch.tensor([4, 32]),
        "a.weight_scale": torch.ones(4, 1),
        "b.weight": torch.ones(2, 4, dtype=torch.bfloat16),
    }
    if index is None:
        tensors["a.weight_shape"][0] = 2**62
    else:
        tensors[name].view(-1)[index] = value
    weights = {"num_bits": 4, "strategy": "channel"}
    group = {"targets": ["Linear"], "weights": weights, "format": "pack-quantized"}
    write(tmp_path, tensors, quantization_config={"config_groups": {"g": group}})
    report = inspect_checkpoint(tmp_path)
    assert not report.sound
    (problem,) = (row.problem for row in report.modules if row.problem)
    assert problem.startswith(f"{name}: ")
