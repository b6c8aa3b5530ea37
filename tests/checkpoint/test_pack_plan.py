"""What packing would do: patterns, sizes, reasons; and models that cannot be packed."""

from pathlib import Path

import pytest
import torch

from rac_modifier.checkpoint.pack_plan import MatrixPlan, PackPlan, plan_packing
from rac_modifier.checkpoint.packing import pack_checkpoint
from rac_modifier.errors import RacError
from tests.checkpoint.checkpoint_helpers import (
    PRUNERS,
    Q,
    contents,
    edited,
    prune_24,
    save_quantized,
    tiny_model,
    write,
)
from tests.tiny import linears


def saved_with(folder: Path, weights: dict[str, torch.Tensor], **config: object) -> Path:
    return write(folder, {f"{name}.weight": weight for name, weight in weights.items()}, **config)


def two_of_four(rows: int = 32, columns: int = 64) -> torch.Tensor:
    weight = torch.randn(rows, columns)
    prune_24(weight)
    return weight


def by_name(plan: PackPlan) -> dict[str, MatrixPlan]:
    return {row.name: row for row in plan.matrices}


@pytest.mark.parametrize(
    ("structure", "scheme"),
    [
        ("2:4", None),
        ("unstructured", None),
        ("2:4", "w4"),
        ("unstructured", "w8a8"),
        ("2:4", "fp8"),
    ],
)
def test_patterns_and_sizes_are_those_that_packing_makes(saved, tmp_path, structure, scheme):
    if scheme is None:
        folder, _, modules = saved(structure, packed=False)
    else:
        folder, modules = tmp_path, save_quantized(tmp_path, structure, scheme)
    before = contents(folder)
    plan = plan_packing(folder)
    assert contents(folder) == before
    assert plan.structures == modules
    made = pack_checkpoint(folder, modules)
    assert plan.format == made.format
    assert made.dense_bytes == sum(row.dense_bytes - row.scale_bytes for row in plan.packed)
    assert made.packed_bytes == sum(
        (row.packed_bytes or 0) - row.scale_bytes for row in plan.packed
    )


def test_each_module_has_a_pattern_of_its_own(tmp_path):
    model = tiny_model(tied=False)
    pruned = dict(zip(linears(model), ["2:4", "unstructured", "dense"] * 5, strict=False))
    for name, linear in linears(model).items():
        if pruned[name] in PRUNERS:
            PRUNERS[pruned[name]](linear.weight.data)
    model.save_pretrained(tmp_path)
    plan = plan_packing(tmp_path)
    dense = [name for name, pattern in pruned.items() if pattern == "dense"]
    assert plan.structures == {n: s for n, s in pruned.items() if s != "dense"}
    assert plan.format == "sparse-bitmask"
    assert plan.ignore == sorted([*dense, "lm_head"])


@pytest.mark.parametrize(("more", "structure"), [(256, "2:4"), (257, "unstructured")])
def test_zeros_that_2of4_explains_less_than_four_fifths_of_are_unstructured(
    tmp_path, more, structure
):
    """2:4 leaves 1024 zeros of 2048 weights; the limit is 1280."""
    weight = two_of_four()
    kept = weight.view(-1).nonzero()[:more, 0]
    weight.view(-1)[kept] = 0.0
    plan = plan_packing(saved_with(tmp_path, {"model.up": weight}))
    assert plan.structures == {"model.up": structure}


def test_the_reasons_of_what_stays_dense(tmp_path):
    few = torch.randn(32, 64).masked_fill(torch.rand(32, 64) < 0.02, 0.0)
    names = ("model.up", "model.embed_tokens", "lm_head", "model.mlp.gate")
    weights = {name: two_of_four() for name in names}
    weights |= {"model.few": few, "model.double": two_of_four().double()}
    others = {"model.norm": torch.ones(64), "model.conv": torch.zeros(4, 4, 4)}
    plan = plan_packing(saved_with(tmp_path, {**weights, **others}))
    served_dense = "vLLM serves embeddings, output matrices and routers dense"
    size = few.count_nonzero().item() * 4 + 32 * 8 + 16
    assert {name: row.reason for name, row in by_name(plan).items()} == {
        "model.up": None,
        "model.few": f"would take {size + 32 * 8:,} bytes packed, and takes {few.nbytes:,} dense",
        "model.double": "stored as F64, which cannot be packed",
        **dict.fromkeys(("model.embed_tokens", "lm_head", "model.mlp.gate"), served_dense),
    }
    assert set(plan.ignore) == {"model.few", "model.double", "lm_head", "model.mlp.gate"}
    transposed = by_name(plan_packing(saved_with(tmp_path, weights, model_type="gpt2")))
    reason = "stored as [inputs, outputs], which is served dense"
    assert transposed["model.up"].reason == reason


def test_a_weight_with_zero_points_stays_dense(tmp_path):
    save_quantized(tmp_path, "2:4", "w8a8")
    with edited(tmp_path) as tensors:
        tensors[f"{Q}.weight_zero_point"] = torch.ones(64, 1)
    reason = by_name(plan_packing(tmp_path))[Q].reason
    assert reason == "quantized with a weight_zero_point: its zeros are not stored as zeros"


def test_a_weight_with_a_scale_per_block_stays_dense(tmp_path):
    weights = {"type": "float", "strategy": "block", "block_structure": [128, 128]}
    weight = torch.zeros(160, 256, dtype=torch.float8_e4m3fn)
    tensors = {"up.weight": weight, "up.weight_scale": torch.ones(2, 2)}
    config = {"format": "float-quantized", "config_groups": {"g": {"weights": weights}}}
    write(tmp_path, tensors, quantization_config={"quant_method": "compressed-tensors", **config})
    reason = "its scales are per block of rows and columns, which no sparse kernel reads"
    assert by_name(plan_packing(tmp_path))["up"].reason == reason
    with pytest.raises(RacError, match=f"^up: {reason}; .*FP8_DYNAMIC instead of FP8_BLOCK"):
        pack_checkpoint(tmp_path, {"up": "2:4"})


def test_negative_zeros(tmp_path):
    kept = two_of_four() != 0
    folder = saved_with(tmp_path, {"up": -torch.rand(32, 64) * kept})
    plan = plan_packing(folder)
    assert (plan.format, plan.structures) == ("sparse-24-bitmask", {"up": "2:4"})
    (row,) = plan_packing(folder, keep_negative_zeros=True).matrices
    assert (row.negative_zeros, row.is_24) == (int((~kept).sum()), False)
    assert row.reason is not None  # every value is stored, and a mask


PATTERNS = [("3:5", "3:5"), ("4:5", "2:4"), ("3:7", "2:4")]


@pytest.mark.parametrize(("recorded", "stated"), PATTERNS)
def test_a_recorded_pattern_is_stated_where_it_holds(tmp_path, recorded, stated):
    weight = torch.randn(64, 60)
    weight.view(-1, 5)[:, :3] = 0
    record = {"storage": "dense", "modules": {"up": recorded}}
    plan = plan_packing(saved_with(tmp_path, {"up": weight}, rac_sparsity=record))
    assert plan.structures == {"up": stated}


def test_a_model_without_matrices_is_refused(tmp_path):
    with pytest.raises(RacError, match="nothing to pack"):
        plan_packing(saved_with(tmp_path, {"norm": torch.ones(4)})).check_gain()


@pytest.mark.parametrize("name", ["up", "norm", "embed_tokens"])
def test_nan_is_refused(tmp_path, name):
    weights = {"up": two_of_four(), "norm": torch.ones(8), "embed_tokens": torch.randn(8, 8)}
    weights[name].view(-1)[-1] = float("nan")
    folder = saved_with(tmp_path, weights)
    with pytest.raises(RacError, match=rf"^{name}\.weight: holds values that are not finite"):
        plan_packing(folder)


def two_of_four_values(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Values of 1 to 7, two of every four, at random places, are zero."""
    zero = (torch.rand(128, 64, 4).argsort(dim=2) < 2).view(128, 256)
    return torch.randint(1, 8, (128, 256)).masked_fill(zero, 0).float().to(dtype)


def structure_of(weight: torch.Tensor, folder: Path) -> str | None:
    (row,) = plan_packing(saved_with(folder, {"up": weight})).matrices
    return row.structure


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int8, torch.float8_e4m3fn])
def test_two_of_four_is_seen(tmp_path, dtype):
    assert structure_of(two_of_four_values(dtype), tmp_path) == "2:4"


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9, 1.0])
def test_zeros_at_random_places_are_unstructured(tmp_path, share):
    weight = torch.randn(256, 64).masked_fill(torch.rand(256, 64) < share, 0)
    assert structure_of(weight, tmp_path) == "unstructured"


def test_a_broken_group_breaks_the_pattern_and_more_zeros_do_not(tmp_path):
    """Rounding to int4 makes one kept weight in six zero."""
    weight = two_of_four_values()
    assert structure_of(weight.masked_fill(torch.rand(128, 256) < 1 / 6, 0), tmp_path) == "2:4"
    weight[127, 252:] = 1.0
    assert structure_of(weight, tmp_path) == "unstructured"
    assert structure_of(weight[:, :250].contiguous(), tmp_path) == "unstructured"
