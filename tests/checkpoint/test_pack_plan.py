"""What packing would do: patterns, sizes, reasons; and models that cannot be packed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rac_modifier.checkpoint.pack_plan import (
    MatrixPlan,
    PackPlan,
    find_structure,
    fits_24,
    plan_packing,
    without_negative_zeros,
)
from rac_modifier.checkpoint.packing import pack_checkpoint
from rac_modifier.checkpoint.stored_weight import count_stored
from rac_modifier.errors import RacError
from tests.checkpoint.checkpoint_helpers import (
    SCHEMES,
    Q,
    Saved,
    contents,
    edited,
    prune_24,
    prune_half,
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


@pytest.mark.parametrize("structure", ["2:4", "unstructured"])
@pytest.mark.parametrize("scheme", [None, *SCHEMES])
def test_patterns_and_sizes_are_those_that_packing_makes(
    saved: Saved, tmp_path: Path, structure: str, scheme: str
) -> None:
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
    zeros = sum((row.sparsity or 0) * row.rows * row.columns for row in plan.packed)
    weights = sum(row.rows * row.columns for row in plan.packed)
    assert made.global_sparsity == pytest.approx(zeros / weights)


def test_each_module_has_a_pattern_of_its_own(tmp_path: Path) -> None:
    model = tiny_model(tied=False)
    pruned = dict(zip(linears(model), ["2:4", "unstructured", "3:8", "dense"] * 4, strict=False))
    for name, linear in linears(model).items():
        if pruned[name] == "2:4":
            prune_24(linear.weight.data)
        elif pruned[name] == "unstructured":
            prune_half(linear.weight.data)
        elif pruned[name] == "3:8":
            linear.weight.data.view(-1, 8)[:, [0, 3, 6]] = 0
    model.save_pretrained(tmp_path)
    plan = plan_packing(tmp_path)
    assert plan.structures == {
        name: pattern for name, pattern in pruned.items() if pattern != "dense"
    }
    assert plan.format == "sparse-bitmask"
    assert plan.ignore == sorted(
        [name for name, pattern in pruned.items() if pattern == "dense"] + ["lm_head"]
    )


def test_the_reasons_of_what_stays_dense(tmp_path: Path) -> None:
    few = torch.randn(32, 64).masked_fill(torch.rand(32, 64) < 0.02, 0.0)
    weights = {
        "model.up": two_of_four(),
        "model.few": few,
        "model.double": two_of_four().double(),
        "model.embed_tokens": two_of_four(),
        "lm_head": two_of_four(),
        "model.mlp.gate": two_of_four(),
        "model.norm": torch.ones(64),
        "model.conv": torch.zeros(4, 4, 4),
    }
    plan = plan_packing(saved_with(tmp_path, weights))
    rows = by_name(plan)
    assert list(plan.structures) == ["model.up"]
    assert rows.keys() == weights.keys() - {"model.norm", "model.conv"}
    size = few.count_nonzero().item() * 4 + 32 * 8 + 16
    assert (
        rows["model.few"].reason
        == f"would take {size + 32 * 8:,} bytes packed, and takes {few.nbytes:,} dense"
    )
    assert rows["model.double"].reason == "stored as F64, which cannot be packed"
    assert rows["model.embed_tokens"].reason == "an embedding"
    assert rows["lm_head"].reason == "the output matrix, which is served dense"
    assert rows["model.mlp.gate"].reason == "a router of experts, which is served dense"
    transposed = plan_packing(saved_with(tmp_path, weights, model_type="gpt2"))
    reason = "stored as [inputs, outputs], which is served dense"
    assert by_name(transposed)["model.up"].reason == reason
    assert set(plan.ignore) == {"model.few", "model.double", "lm_head", "model.mlp.gate"}


def test_experts_of_a_layer_are_packed_together_or_not_at_all(tmp_path: Path) -> None:
    names = [f"layers.{layer}.mlp.experts.{n}.up_proj" for layer in (0, 1) for n in (0, 1)]
    weights = {name: two_of_four() for name in names}
    weights[names[3]] = torch.randn(32, 64)
    plan = plan_packing(saved_with(tmp_path, weights))
    assert list(plan.structures) == names[:2]
    assert (
        by_name(plan)[names[2]].reason
        == f"experts of a layer are stored alike, and {names[3]} stays dense"
    )


@pytest.mark.parametrize(
    ("scheme", "part", "change", "reason"),
    [
        ("w8a8", "weight_zero_point", lambda _: torch.ones(64, 1), "its zeros are not stored as"),
        # another tool may store the shape otherwise, which unpacking would not bring back
        ("w4", "weight_shape", lambda shape: shape.int(), "to a layout that cannot be stored"),
    ],
)
def test_quantized_weights_that_stay_dense(
    tmp_path: Path, scheme: str, part: str, change: Callable, reason: str
) -> None:
    save_quantized(tmp_path, "2:4", scheme)
    with edited(tmp_path) as tensors:
        tensors[f"{Q}.{part}"] = change(tensors.get(f"{Q}.{part}"))
    assert reason in (by_name(plan_packing(tmp_path))[Q].reason or "")


def test_negative_zeros(tmp_path: Path) -> None:
    kept = two_of_four() != 0
    folder = saved_with(tmp_path, {"up": -torch.rand(32, 64) * kept})
    (row,) = plan_packing(folder).matrices
    assert (row.structure, row.negative_zeros, row.fits_24) == ("2:4", int((~kept).sum()), False)
    assert row.reason is not None
    assert row.reason.endswith(
        f"as its {row.negative_zeros:,} zeros that are -0.0 are kept (see --drop-negative-zeros)"
    )
    plan = plan_packing(folder, drop_negative_zeros=True)
    assert (plan.format, plan.structures) == ("sparse-24-bitmask", {"up": "2:4"})


@pytest.mark.parametrize(
    ("recorded", "stated"),
    [
        ("3:5", "3:5"),
        ("unstructured", "unstructured"),
        ("4:5", "2:4"),
        ("3:7", "2:4"),
        ("x", "2:4"),
    ],
)
def test_a_recorded_pattern_is_stated_where_it_holds(
    tmp_path: Path, recorded: str, stated: str
) -> None:
    weight = torch.randn(64, 60)
    weight.view(-1, 5)[:, :3] = 0
    record = {"storage": "dense", "modules": {"up": recorded}}
    assert plan_packing(saved_with(tmp_path, {"up": weight}, rac_sparsity=record)).structures == {
        "up": stated
    }


def test_a_model_without_matrices_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RacError, match="no weight matrix that can be packed"):
        plan_packing(saved_with(tmp_path, {"norm": torch.ones(4)})).check_gain()


@pytest.mark.parametrize("name", ["up", "norm", "embed_tokens"])
def test_nan_is_refused(tmp_path: Path, name: str) -> None:
    weights = {"up": two_of_four(), "norm": torch.ones(8), "embed_tokens": torch.randn(8, 8)}
    weights[name].view(-1)[-1] = float("nan")
    folder = saved_with(tmp_path, weights)
    with pytest.raises(RacError, match=rf"^{name}\.weight: holds values that are not finite"):
        plan_packing(folder)


DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.int8, torch.float8_e4m3fn]


def values(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Without a zero."""
    return (
        torch.randint(1, 8, (rows, columns)) * (1 - 2 * torch.randint(0, 2, (rows, columns)))
    ).to(dtype)


def masked(weight: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """Zeros put into any dtype, by its bits."""
    weight.view({1: torch.int8, 2: torch.int16, 4: torch.int32}[weight.element_size()])[zero] = 0
    return weight


def zeros_of(rows: int, columns: int, n: int, m: int) -> torch.Tensor:
    """N of every M, at random."""
    order = torch.rand(rows, columns // m, m).argsort(dim=2)
    return (order < n).view(rows, columns)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "m"), [(2, 4), (3, 8), (4, 8), (6, 16), (8, 16)])
def test_n_of_m_is_found(n: int, m: int, dtype: torch.dtype) -> None:
    weight = masked(values(128, 256, dtype), zeros_of(128, 256, n, m))
    assert find_structure(weight) == f"{n}:{m}"


def test_one_broken_group_breaks_the_pattern() -> None:
    weight = masked(values(128, 256), zeros_of(128, 256, 2, 4))
    weight[127, 252:] = 1.0
    assert find_structure(weight) == "unstructured"


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_zeros_at_random_places_are_unstructured(share: float) -> None:
    weight = masked(values(256, 64), torch.rand(256, 64) < share)
    assert find_structure(weight) == "unstructured"


def test_rounding_kept_weights_to_zero_leaves_the_pattern() -> None:
    """As int4 does with one kept weight in six."""
    zero = zeros_of(64, 128, 2, 4) | (torch.rand(64, 128) < 1 / 6)
    assert find_structure(masked(values(64, 128, torch.int8), zero)) == "2:4"


def test_columns_that_are_no_multiple() -> None:
    assert find_structure(masked(values(128, 250), torch.rand(128, 250) < 0.5)) == "unstructured"
    assert find_structure(masked(values(128, 252), zeros_of(128, 252, 2, 4))) == "2:4"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float8_e4m3fn])
def test_negative_zeros_are_zeros_to_the_pattern_and_values_to_the_layout(
    dtype: torch.dtype,
) -> None:
    zero = zeros_of(64, 64, 2, 4)
    plain = values(64, 64).masked_fill(zero, 0.0).to(dtype)
    multiplied = (-values(64, 64).abs() * ~zero).to(
        dtype
    )  # as a mask that is multiplied in leaves them
    assert fits_24(plain)
    assert not fits_24(multiplied)
    assert (count_stored(plain), count_stored(multiplied)) == (int((~zero).sum()), 64 * 64)
    assert find_structure(multiplied) == "2:4"
    positive = without_negative_zeros(multiplied)
    assert torch.equal(positive.float(), multiplied.float())
    assert fits_24(positive)
    assert count_stored(positive) == int((~zero).sum())
    assert count_stored(multiplied) == 64 * 64, "the argument is left as it is"
