"""What the memory prediction counts, and the refusal that follows from it; whole runs are in test_memory_of_runs.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from llmcompressor.modeling.moe.linearize import linearize_moe
from transformers import AutoModelForCausalLM

from rac_modifier.llmcompressor import memory
from rac_modifier.llmcompressor.group_shape import GroupShape
from rac_modifier.llmcompressor.memory import MemoryNeed
from rac_modifier.llmcompressor.step_memory import Attention, SolverMemory
from tests.tiny import save_tiny_experts

CPU, OTHER = torch.device("cpu"), torch.device("meta")


def need(**changes) -> MemoryNeed:
    settings = {
        "tokens": 1000, "batch_tokens": 100, "hidden": 64, "activation_bytes": 2, "by_layer": False,
    }  # fmt: skip
    solver = {"solver": "alps", "refits": True, "float32": False}
    solver |= {
        name: changes.pop(name)
        for name in list(changes)
        if name in SolverMemory.__dataclass_fields__
    }
    return MemoryNeed(**{**settings, **changes}, solver=SolverMemory(**solver))


def test_activations_are_counted_for_each_stream():
    """1,000 tokens of 256 + 64 numbers of two bytes, for one model or two."""
    group = GroupShape("down", 256, 64)
    assert need().kept(group) == 1000 * 320 * 2
    assert need(dense_target=True).kept(group) == 2 * 1000 * 320 * 2
    wider = replace(group, after=GroupShape("q", 270, 64))
    assert need(dense_target=True).kept(wider) == 1000 * (320 + 334) * 2, (
        "it ends at what the next group reads"
    )
    assert need(by_layer=True).kept(group) == 1000 * 64 * 2


def test_a_large_batch_counts_where_it_is_more_than_the_solver_needs():
    group = GroupShape("q", 64, 64)
    assert need(batch_tokens=3_000).statistics(group) == 4 * (2 * 64**2 + 3_000 * 64 * 2)
    assert need(batch_tokens=10_000).statistics(group) == 4 * (2 * 64**2 + 4096 * 64 * 2), (
        "4,096 tokens at a time"
    )
    assert need().statistics(GroupShape("q", 256, 64)) == 4 * (
        256**2 * (1 + 10 / 16) + 100 * 256 * 2
    ), "half a lane"
    assert (
        need(batch_tokens=10_000).work(group)
        == need(batch_tokens=10_000).forward(group)
        == 10_000 * 2 * 4.5 * 64
    )
    assert need(batch_tokens=10).work(group) < 4 * 64**2 * 12


def test_experts_that_are_solved_at_once_are_counted_together():
    small, large = GroupShape("gate", 64, 64), GroupShape("gate", 2048, 2048)
    alone = need(solver="sparsegpt")
    for group, times in ((small, 6), (large, 1)):
        assert need(solver="sparsegpt", experts=6).solving(group) == times * alone.solving(group)
        # a lane's matrix is there once, the sums of all wait to be solved
        assert (
            need(solver="sparsegpt", experts=6).statistics(group)
            == alone.statistics(group) + (times - 1) * 4 * 64**2
        )
    assert need(solver="alps", experts=6).work(small) == need(solver="alps").work(small)
    rounded, one = need(solver="alps", rounds=True, experts=6), need(solver="alps", rounds=True)
    assert 5.9 < rounded.solving(small) / one.solving(small) <= 6


def test_layer_by_layer_the_experts_of_a_layer_are_one_group_beside_the_hessians_of_down(tmp_path):
    model = linearize_moe(
        AutoModelForCausalLM.from_pretrained(save_tiny_experts(tmp_path / "mixture"))
    )
    names = {
        m: n
        for n, m in model.named_modules()
        if isinstance(m, torch.nn.Linear) and "layers.0" in n and not n.endswith("gate")
    }
    found = GroupShape.by_layer(model, names)
    experts = [shape for shape in found if ".experts." in shape.name]
    assert [(one.columns, one.rows, one.alike) for one in experts] == [(64, 4 * 2 * 32, 0)] + 4 * [
        (32, 64, 4)
    ]
    # q, k and v read one tensor; o reads as many numbers as they, and its parent is theirs
    assert [(one.name, one.rows) for one in found if one not in experts] == [
        ("model.layers.0.self_attn.q_proj", 64 + 32 + 32 + 64)
    ]
    whole = 4 * (2 * 64**2 + 4 * 32**2)  # bytes of all Hessians of the layer
    for one in found:
        own = 4 * one.columns**2
        assert (one.beside, one.summed) == (whole - own, 2 * (whole - own))
    of_layer, alone = (
        need(by_layer=True, solver="sparsegpt", experts=4),
        need(by_layer=True, solver="sparsegpt"),
    )
    for one, times in zip(
        experts[:2], (1, 4), strict=True
    ):  # gate and up are one group, down is four
        bare = replace(one, beside=0, summed=0, alike=1)
        assert of_layer.solving(one) == times * alone.solving(bare) + one.beside
        assert of_layer.statistics(one) == alone.statistics(bare) + one.summed


def test_a_forward_pass_counts_where_it_is_more():
    """A batch of 1,000 tokens: three times the residual stream, and gate and up with their product."""
    group, down = GroupShape("gate", 64, 512), GroupShape("down", 256, 64)
    assert need(batch_tokens=1000).forward(group) == 1000 * 2 * (3 * 64 + 1.5 * 512)
    attention = Attention(kept=5000, peak=10**9)
    attends = need(attention=attention)
    assert attends.kept(group) == need().kept(group) + 5000
    assert attends.work(group) == 10**9
    assert attends.forward(down) == need().forward(down), (
        "no attention between down and what comes next"
    )
    assert need(attention=attention, attention_follows_all=True).forward(down) == 10**9
    dense = need(
        attention=attention, dense_target=True
    )  # the dense stream runs while sums are there
    assert dense.work(group) == dense.statistics(group) == 10**9 + 4 * 2 * 2 * 64**2
    assert attends.forward(replace(group, name="layers.0.mlp.gate_proj")) == need().forward(
        group
    ), "nor behind gate"
    layer = need(attention=attention, by_layer=True)
    assert layer.work(down) == 10**9 + 4 * 256**2 * (1 + 10 / 16) + layer.copies(down)


def test_while_the_last_batch_runs_the_others_have_what_the_next_group_reads():
    """6,000 of 10,000 tokens have 256 numbers of two bytes in place of 64 by then; none have less."""
    gate = GroupShape("gate", 64, 512, after=GroupShape("down", 256, 64))
    large = need(tokens=10_000, batch_tokens=4000)
    assert large.grows(gate) == 6000 * (256 - 64) * 2
    assert large.work(gate) == large.forward(gate)
    assert large.bytes_on(CPU, CPU, CPU, gate) == large.kept(gate) + int(
        1.15 * large.work(gate) + large.grows(gate)
    )
    assert large.bytes_on(OTHER, OTHER, CPU, gate) == large.work(gate, OTHER), (
        "they are kept elsewhere"
    )
    for other in (need(by_layer=True), need(batch_tokens=1000)):
        assert other.grows(gate) == 0
    for group in (
        replace(gate, routed=True),
        replace(gate, after=None),
        GroupShape("down", 256, 64, after=gate),
    ):
        assert large.grows(group) == 0


def test_where_the_dense_stream_waits_its_weights_are_counted_and_not_its_wide_inputs():
    """1,000 tokens of 256 - 64 numbers more are more than the 64 * 100 weights of gate and up."""
    gate, down = GroupShape("gate", 64, 100), GroupShape("down", 256, 64)
    gate, down = replace(gate, after=down), replace(down, before=gate)
    dense, alone = need(dense_target=True), need(dense_target=True, tokens=10)
    assert dense.waits(gate, down)
    assert not alone.waits(gate, down)
    assert not need().waits(gate, down)
    assert not dense.waits(gate, replace(down, routed=True))
    assert dense.kept(gate) == 1000 * 4 * 64 * 2
    assert dense.kept(down) == 1000 * (256 + 3 * 64) * 2
    assert dense.solving(gate) == alone.solving(gate) + 64 * 100 * 2
    assert dense.solving(down) == alone.solving(down)
    batch = need(dense_target=True, batch_tokens=10_000)
    runs = max(batch.forward(gate), batch.forward(down))
    sums = 4 * (256**2 * (1 + 10 / 16) + 2 * 64 * 256) + 64 * 100 * 2 + 10_000 * 256 * 2
    assert batch.statistics(down) == sums + max(runs, 4 * (4096 * 256 * 4 + 0.5 * 64 * 256))


@pytest.mark.parametrize(("faster", "numbers"), [(True, (100 + 64) * 256), (False, 0)])
def test_inputs_are_copied_where_onednn_multiplies_them(faster, numbers, monkeypatch):
    """A batch of 100 tokens, and a block row of 64 columns."""
    monkeypatch.setattr(memory, "onednn_is_faster", lambda device: faster)
    assert need().copies(GroupShape("down", 256, 64)) == 4 * numbers


def test_a_process_on_a_cpu_has_gaps_between_its_blocks():
    group = GroupShape("down", 256, 64)
    work, kept = need().work(group), need().kept(group)
    assert need().bytes_on(CPU, CPU, CPU, group) == int(1.15 * work) + kept
    assert need().bytes_on(CPU, OTHER, CPU, group) == kept
    assert need().bytes_on(OTHER, OTHER, CPU, group) == need().work(group, OTHER)


@pytest.mark.parametrize(("faster", "shapes"), [(True, 8 * 2 * (4 + 1 + 1)), (False, 0)])
def test_code_for_the_tokens_of_experts_is_counted_where_onednn_multiplies(
    faster, shapes, monkeypatch
):
    """Four block rows of a Hessian, a forward pass and a cross moment, of two groups, in eight sizes."""
    monkeypatch.setattr(memory, "onednn_is_faster", lambda device: faster)
    group, dense = GroupShape("gate", 256, 64, routed=True), need(dense_target=True)
    assert dense.code(group) == int(shapes * 0.57 * 2**20)
    assert dense.code(replace(group, routed=False)) == 0
    assert need().code(group) == int(shapes * 5 / 6 * 0.57 * 2**20)
    whole = dense.bytes_on(CPU, CPU, CPU, group)
    assert whole == int(1.15 * dense.work(group)) + dense.kept(group) + dense.code(group)


def test_where_gate_runs_twice_downs_inputs_are_counted_for_one_batch():
    """Of 1,000 tokens in batches of 100: gate's 64 numbers of two bytes are kept in place of down's 256."""
    o, gate, down = (
        GroupShape("o", 32, 64),
        GroupShape("gate", 64, 500),
        GroupShape("down", 256, 64),
    )
    q = GroupShape("q", 64, 64)
    o, gate = replace(o, after=gate), replace(gate, before=o, after=down)
    down = replace(down, before=gate, after=q)
    once, twice = need(), need(twice_before=256)
    assert (
        twice.runs_twice(gate, down),
        twice.runs_twice(o, gate),
        once.runs_twice(gate, down),
    ) == (
        True,
        False,
        False,
    )
    assert not need(twice_before=256, by_layer=True).runs_twice(gate, down)
    assert not twice.runs_twice(gate, replace(down, routed=True))
    assert once.kept(down) == 1000 * (256 + 64) * 2
    assert twice.kept(down) == twice.kept(gate) == 1000 * (64 + 64) * 2
    assert (once.grows(gate), twice.grows(gate), twice.grows(down)) == (900 * (256 - 64) * 2, 0, 0)
    batch = 100 * 256 * 2
    assert twice.forward(down) == max(once.forward(gate), once.forward(down) + batch)
    sums = 4 * 256**2 * (1 + 10 / 16) + batch
    assert twice.statistics(down) == sums + max(once.forward(gate), 4 * 100 * 256 * 2)
    both = need(twice_before=256, dense_target=True, tokens=10_000)
    assert both.waits(gate, down)
    assert both.kept(down) == 10_000 * 4 * 64 * 2
    assert both.statistics(down) == (
        4 * (256**2 * (1 + 10 / 16) + 2 * 64 * 256) + 64 * 500 * 2 + 2 * batch
        + max(once.forward(gate), once.forward(down) + batch, 4 * (100 * 256 * 4 + 0.5 * 64 * 256))
    )  # fmt: skip
