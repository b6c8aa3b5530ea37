"""Another recipe in the same process gives the bits that it gave before a run of ours."""

import torch
from llmcompressor import oneshot

from rac_modifier import ReasoningAwareSparseGPTModifier
from tests.llmcompressor.modifier_helpers import (
    assert_same_weights,
    generic_loader,
    upstreams_sparsegpt,
    weights,
)
from tests.llmcompressor.test_pipeline import loaded
from tests.tiny import entry


def test_upstreams_recipe_gives_the_same_bits_before_and_after_ours(tiny_folder, trace_store):
    def upstreams():
        torch.manual_seed(0)
        options = {"dataset": generic_loader(), "pipeline": "sequential"}
        return weights(oneshot(model=str(tiny_folder), recipe=upstreams_sparsegpt(), **options))

    expected, before = upstreams(), loaded()
    ours = ReasoningAwareSparseGPTModifier(**entry(trace_store, preset="paper"))
    oneshot(model=str(tiny_folder), recipe=ours)
    assert loaded() is before
    assert_same_weights(expected, upstreams())
