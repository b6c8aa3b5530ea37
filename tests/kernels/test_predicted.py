"""Predicted times of a checkpoint: layers fused as vLLM fuses them, each kind with its kernel or the reason for none."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from rac_modifier.checkpoint.inspect import CheckpointReport, ModuleRow
from rac_modifier.errors import RacError
from rac_modifier.kernels.cuda.cards import card_of
from rac_modifier.kernels.cuda.layout import BF16, INT4, INT4_FP32_SCALES, UNSTRUCTURED
from rac_modifier.kernels.cuda.predict import dense_time, sparse_time
from rac_modifier.kernels.interface import stay_dense
from rac_modifier.kernels.plan import PlanRow, plan_row
from rac_modifier.kernels.predicted import Prediction, predict_checkpoint

H100 = card_of("h100")
SHAPES = {
    "q_proj": (1024, 2048),
    "k_proj": (512, 2048),
    "v_proj": (512, 2048),
    "o_proj": (2048, 1024),
}


def row(name: str, rows: int, columns: int, **changes: object) -> ModuleRow:
    fields = {
        "dtype": "BF16",
        "stored": "sparse-24-bitmask",
        "sparsity": 0.5,
        "stored_bytes": rows * columns,
        "dense_bytes": 0,
    }
    return ModuleRow(name, rows, columns, **{**fields, **changes})


def planned(
    name: str,
    rows: int,
    columns: int,
    dtype: torch.dtype = torch.bfloat16,
    groups: int = 1,
    two_of_four: bool = True,
    scale_bytes: int = 4,
) -> PlanRow:
    stored = rows * columns // 2
    return plan_row(
        name,
        rows,
        columns,
        stored,
        dtype,
        dtype,
        groups,
        two_of_four=two_of_four,
        scale_bytes=scale_bytes,
    )


def predict(modules: list[ModuleRow], plan: list[PlanRow], tokens: int = 1) -> Prediction:
    report = CheckpointReport(Path("out"), "sparse-24-bitmask", tuple(modules), 0, None)
    return predict_checkpoint(report, plan, H100, tokens)


def attention(layers: int = 2) -> tuple[list[str], list[ModuleRow]]:
    names = [f"model.layers.{n}.self_attn.{last}" for n in range(layers) for last in SHAPES]
    return names, [row(name, *SHAPES[name.rpartition(".")[2]]) for name in names]


def test_parts_are_fused_and_layers_that_run_alike_are_one_row():
    names, modules = attention()
    plan = [planned(name, *SHAPES[name.rpartition(".")[2]]) for name in names]
    found = predict(
        [*modules, row("lm_head", 1000, 128, stored="dense", reason="not pruned")], plan, tokens=9
    )
    assert [
        (each.kind, each.rows, each.columns, each.count, each.kernel) for each in found.layers
    ] == [
        ("qkv_proj", 2048, 2048, 2, "2:4"),
        ("o_proj", 2048, 1024, 2, "2:4"),
        ("lm_head", 1000, 128, 1, "dense"),
    ]
    qkv, o, head = found.layers
    assert qkv.time == sparse_time(H100, BF16, 2048, 2048, 9)
    assert (qkv.reason, head.reason) == (None, "dense because not pruned")
    assert head.time == dense_time(H100, 1000, 128, 9, 2.0)
    assert qkv.dense["int4"] == dense_time(H100, 2048, 2048, 9, 0.515625).total
    assert head.dense == dict.fromkeys(["bf16", "fp8", "int4"], head.time.total), (
        "nobody quantizes the output matrix here"
    )
    assert found.here == pytest.approx(2 * qkv.time.total + 2 * o.time.total + head.time.total)
    assert found.dense("fp8") == pytest.approx(
        2 * qkv.dense["fp8"] + 2 * o.dense["fp8"] + head.dense["fp8"]
    )
    assert found.in_cache


def test_four_bits_in_groups_have_a_kernel():
    shape = 4096, 2048
    for scale_bytes, layout in ((2, INT4[128]), (4, INT4_FP32_SCALES[128])):
        plan = [planned("a.o_proj", *shape, torch.int32, groups=16, scale_bytes=scale_bytes)]
        (layer,) = predict([row("a.o_proj", *shape)], plan).layers
        assert (layer.kernel, layer.time) == (layout.title, sparse_time(H100, layout, *shape, 1))
        assert layer.nbytes == layout.nbytes(*shape)
    parts = [
        f"a.{each}_proj" for each in "qkv"
    ]  # one part needs scales of float32, so the fused layer has them
    plan = [
        planned(name, *shape, torch.int32, 16, scale_bytes=4 if "k" in name[:3] else 2)
        for name in parts
    ]
    (layer,) = predict([row(name, *shape) for name in parts], plan).layers
    assert (layer.rows, layer.kernel) == (3 * 4096, INT4_FP32_SCALES[128].title)


def test_a_layer_that_is_predicted_to_be_faster_dense_is_dense_as_it_would_be_served():
    """[1536, 1536] of any pattern has 48 blocks for 132 multiprocessors."""
    layer = planned("a.o_proj", 1536, 1536, two_of_four=False)
    (found,) = predict([row("a.o_proj", 1536, 1536)], [layer]).layers
    assert found.kernel == "dense"
    assert found.time == dense_time(H100, 1536, 1536, 1, 2.0)
    assert re.match(
        r"dense because it is predicted on H100 SXM: 3\.\d us packed and 3\.\d us dense in bfl",
        found.reason,
    )


def test_any_pattern_has_a_kernel_and_fused_parts_the_density_of_all():
    modules = [row("a.gate_proj", 2048, 4096), row("a.up_proj", 6144, 4096)]
    plan = [
        plan_row(m.name, m.rows, 4096, int(m.rows * 4096 * density), torch.bfloat16, torch.bfloat16)
        for m, density in zip(modules, (0.25, 0.5), strict=True)
    ]
    (layer,) = predict(modules, plan).layers
    assert (layer.kernel, layer.rows) == ("unstructured", 8192)
    assert layer.nbytes == UNSTRUCTURED.nbytes(8192, 4096, 0.4375)
    assert layer.time == sparse_time(H100, UNSTRUCTURED, 8192, 4096, 1, 0.4375)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": torch.int8, "groups": 8}, "there is no GPU kernel for int8 in groups of 32"),
        ({"dtype": torch.float8_e5m2}, "there is no GPU kernel for float8_e5m2"),
        ({"dtype": torch.int32, "groups": 8}, "there is no GPU kernel for int4 in groups of 32"),
    ],
)
def test_a_packed_layer_without_a_kernel_is_dense_in_bfloat16(changes, reason):
    (layer,) = predict([row("a.o_proj", 64, 256)], [planned("a.o_proj", 64, 256, **changes)]).layers
    assert layer.kernel == "dense"
    assert layer.reason.startswith(f"dense because {reason}")
    assert layer.time == dense_time(H100, 64, 256, 1, 2.0)


def test_a_float32_checkpoint_is_served_in_bfloat16():
    (layer,) = predict(
        [row("a.o_proj", 2048, 2048)], [planned("a.o_proj", 2048, 2048, torch.float32)]
    ).layers
    assert layer.kernel == "2:4"


def test_a_fused_layer_is_dense_where_its_parts_differ():
    modules = [row("a.gate_proj", 64, 256), row("a.up_proj", 64, 256)]
    ignored = PlanRow(
        "a.up_proj", 64, 256, 1.0, stay_dense("it is not pruned (in ignore)", torch.bfloat16)
    )
    (one,) = predict(modules, [planned("a.gate_proj", 64, 256), ignored]).layers
    assert (one.kind, one.rows, one.reason) == (
        "gate_up_proj",
        128,
        "dense because one part of the fused layer is stored dense",
    )
    four_bits = planned("a.up_proj", 64, 256, torch.int32, groups=2)
    (other,) = predict(modules, [planned("a.gate_proj", 64, 256), four_bits]).layers
    assert other.reason == "dense because the parts of the fused layer are stored differently"


def test_a_part_alone_keeps_its_name_and_other_columns_are_not_fused():
    found = predict(
        [row("a.q_proj", 64, 256), row("b.q_proj", 64, 256), row("b.k_proj", 64, 128)], []
    )
    assert [(each.kind, each.count) for each in found.layers] == [("q_proj", 2), ("k_proj", 1)]


def test_a_model_that_is_not_packed_runs_dense_and_a_quantized_one_on_vllms_own_method():
    dense = row("a.o_proj", 64, 256, stored="dense", reason="not pruned")
    fp8 = row(
        "b.o_proj",
        64,
        256,
        stored="dense",
        dtype="F8_E4M3",
        reason="not pruned",
        stored_bytes=64 * 256 + 128,
    )
    first, second = predict([dense, fp8], []).layers
    assert (first.kernel, first.reason, first.time) == (
        "dense",
        "dense because not pruned",
        dense_time(H100, 64, 256, 1, 2.0),
    )
    assert second.nbytes == 64 * 256 + 128


def test_experts_and_embeddings_are_left_out_and_counted():
    experts = [row(f"model.layers.0.mlp.experts.{n}.up_proj", 64, 64) for n in range(3)]
    found = predict([*experts, row("model.embed_tokens", 100, 64, read_per_token=False)], [])
    assert found.layers == ()
    assert sorted(found.left_out.values()) == [1, 3]
    assert any(reason.startswith("experts") for reason in found.left_out)


def test_a_model_larger_than_the_cache_is_said_to_be():
    assert not predict([row("a.o_proj", 8192, 8192)], []).in_cache


def test_a_number_of_tokens_that_is_not_predicted_is_an_error():
    with pytest.raises(RacError, match="129 tokens"):
        predict([], [], tokens=129)
