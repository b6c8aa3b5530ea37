"""The text that is logged at load."""

from __future__ import annotations

import torch

from rac_modifier.kernels.interface import Decision, stay_dense
from rac_modifier.vllm_plugin.summary import Summary


def test_the_summary_comes_with_the_last_layer_and_has_every_decision():
    summary = Summary()
    for _ in range(3):
        summary.expect()
    assert summary.add("a", Decision(True, "sparse kernel avx2", "", 1.1, 1.98)) is None
    assert summary.add("b", Decision(True, "sparse kernel avx2", "", 1.3, 1.95)) is None
    text = summary.add("c", stay_dense("it is small", torch.bfloat16))
    assert text is not None
    assert text.splitlines() == [
        "rac: 2 of 3 pruned layers run on a sparse kernel",
        "  sparse kernel avx2: 2 layers, 1.10-1.30 bytes per weight, at most 1.80x faster",
        "  dense because it is small: 1 layer, such as c",
    ]


def test_layers_of_the_same_decision_share_a_line():
    summary = Summary(expected=2)
    summary.add("a", stay_dense("it is small", torch.bfloat16))
    text = summary.add("b", stay_dense("it is small", torch.bfloat16))
    assert text is not None
    assert text.splitlines()[1:] == ["  dense because it is small: 2 layers, such as a"]
