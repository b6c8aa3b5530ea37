"""The pruned model's activations: where stages before wider ones run twice, results are the same bits and less is kept."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from llmcompressor import oneshot
from llmcompressor.pipelines.cache import IntermediatesCache
from transformers import AutoModelForCausalLM

from rac_modifier import ReasoningAwareSparseGPTModifier
from rac_modifier.llmcompressor import memory_check, pruning_modifier
from rac_modifier.llmcompressor.pruned_stream import PrunedStream
from tests.tiny import entry, linears


def pruned(folder, store, **settings):
    model = AutoModelForCausalLM.from_pretrained(folder)
    settings = {"calibration": {"tokens": 1500, "batch_tokens": 256}, **settings}
    oneshot(model=model, recipe=ReasoningAwareSparseGPTModifier(**entry(store, **settings)))
    return model


@pytest.fixture
def short_of_memory(monkeypatch):
    """A run in which all that can be computed twice is."""
    inner = PrunedStream.__init__

    def begin(self, model, cache, *, twice_before):
        inner(self, model, cache, twice_before=128)

    monkeypatch.setattr(PrunedStream, "__init__", begin)


def wide(cache: IntermediatesCache) -> int:
    """Batches of which the cache has down's inputs, of 128 numbers per token; others have at most 64."""
    values = [value.value for batch in cache.batch_intermediates for value in batch.values()]
    return sum(torch.is_tensor(value) and value.shape[-1] == 128 for value in values)


@pytest.mark.parametrize(
    "settings",
    [
        {"preset": "quality"},
        {"preset": "quality", "reconstruct": "pruned"},
        {"preset": "quality", "quantization": {"scheme": "W8A8"}},
    ],
    ids=["towards the dense model", "towards the pruned model", "rounded"],
)
def test_stages_that_run_twice_give_the_same_bits(tiny_folder, trace_store, request, settings):
    once = pruned(tiny_folder, trace_store, **settings)
    request.getfixturevalue("short_of_memory")
    twice = pruned(tiny_folder, trace_store, **settings)
    for (name, ours), theirs in zip(linears(twice).items(), linears(once).values(), strict=True):
        assert torch.equal(ours.weight, theirs.weight), name


@pytest.mark.parametrize("repeats", [True, False])
def test_no_wide_inputs_are_kept_while_down_is_pruned(
    tiny_folder, trace_store, monkeypatch, request, repeats
):
    kept, inner = [], PrunedStream.inputs

    def inputs(self, stage, batch):
        x = inner(self, stage, batch)
        if x.shape[-1] == 128:
            kept.append(wide(self.cache))
        return x

    monkeypatch.setattr(PrunedStream, "inputs", inputs)
    if repeats:
        request.getfixturevalue("short_of_memory")
    pruned(tiny_folder, trace_store, preset="quality")
    assert len(kept) > 6, "down of two layers, in several batches"
    assert (max(kept) == 0) if repeats else (min(kept) > 6)


def test_a_run_that_fits_only_so_is_pruned_so(tiny_folder, trace_store, monkeypatch):
    """First with enough memory, then with as much as half of what computing twice saves."""
    checked, begun = [], []
    check, begin = memory_check.check_memory, PrunedStream.__init__

    def checking(need, groups, *args, **options):
        checked.append((need, groups, args))
        return check(need, groups, *args, **options)

    def beginning(self, model, cache, *, twice_before):
        begun.append(twice_before)
        begin(self, model, cache, twice_before=twice_before)

    monkeypatch.setattr(pruning_modifier, "check_memory", checking)
    monkeypatch.setattr(PrunedStream, "__init__", beginning)
    monkeypatch.setattr(memory_check, "free_bytes", lambda device: 10**12)
    settings = {"preset": "quality", "calibration": {"tokens": 4000, "batch_tokens": 256}}
    pruned(tiny_folder, trace_store, **settings)
    need, groups, devices = checked[-1]
    once, twice = (
        max(each.bytes_on(devices[1], *devices, group) for group in groups)
        for each in (need, replace(need, twice_before=128))
    )
    monkeypatch.setattr(memory_check, "free_bytes", lambda device: (once + twice) // 2)
    pruned(tiny_folder, trace_store, **settings)
    assert begun == [0, 128]
