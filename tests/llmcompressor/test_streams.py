"""Activations of both models: streams that wait give the same bits and keep fewer of the wide inputs."""

from __future__ import annotations

import pytest
import torch
from llmcompressor import oneshot
from llmcompressor.pipelines.cache import IntermediatesCache
from transformers import AutoModelForCausalLM

from rac_modifier import ReasoningAwareSparseGPTModifier
from rac_modifier.llmcompressor import forecast, streams
from rac_modifier.llmcompressor.streams import DenseStream, Stream
from tests.tiny import entry, linears

WIDE = 128  # inputs of down; other modules read at most 64
SETTINGS = {
    "towards the dense model": {"preset": "quality"},
    "towards the pruned model": {"preset": "quality", "reconstruct": "pruned"},
    "rounded": {"preset": "quality", "quantization": {"scheme": "W8A8"}},
}


@pytest.fixture
def pruned(tiny_folder, trace_store):
    def pruned(**settings):
        model = AutoModelForCausalLM.from_pretrained(tiny_folder)
        settings = {"calibration": {"tokens": 1500, "batch_tokens": 256}, **settings}
        recipe = ReasoningAwareSparseGPTModifier(**entry(trace_store, **settings))
        oneshot(model=model, recipe=recipe)
        return model

    return pruned


def assert_same(first, second):
    for (name, ours), theirs in zip(linears(first).items(), linears(second).values(), strict=True):
        assert torch.equal(ours.weight, theirs.weight), name


def wide(cache: IntermediatesCache) -> int:
    """Batches of which a cache has down's inputs."""
    values = [value.value for batch in cache.batch_intermediates for value in batch.values()]
    return sum(torch.is_tensor(value) and value.shape[-1] == WIDE for value in values)


@pytest.fixture
def wide_reads(monkeypatch):
    """For each read of down's inputs, how many batches of them the stream keeps."""
    reads: dict[type, list[int]] = {Stream: [], DenseStream: []}

    def watch(stream):
        inner = stream.inputs

        def inputs(self, stage, batch):
            x = inner(self, stage, batch)
            if x.shape[-1] == WIDE:
                reads[stream].append(wide(self.cache))
            return x

        monkeypatch.setattr(stream, "inputs", inputs)

    watch(Stream)
    watch(DenseStream)
    return reads


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_dense_stream_that_waits_gives_the_same_bits_and_keeps_one_batch(
    pruned, wide_reads, monkeypatch, settings
):
    late = pruned(**settings)
    if settings.get("reconstruct") != "pruned":
        assert max(wide_reads[DenseStream]) == 1
    monkeypatch.setattr(streams, "saves_by_waiting", lambda stage, after, tokens: False)
    wide_reads[DenseStream].clear()
    assert_same(late, pruned(**settings))
    if settings.get("reconstruct") != "pruned":
        assert max(wide_reads[DenseStream]) > 3


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_pruned_stream_that_recomputes_gives_the_same_bits_and_keeps_none(
    pruned, wide_reads, monkeypatch, settings
):
    once = pruned(**settings)
    assert min(wide_reads[Stream]) > 3
    monkeypatch.setattr("rac_modifier.llmcompressor.pipeline.check_memory", lambda *a, **o: WIDE)
    wide_reads[Stream].clear()
    assert_same(once, pruned(**settings))
    assert max(wide_reads[Stream]) == 0


def test_a_run_recomputes_where_it_fits_only_so(pruned, monkeypatch):
    recomputed, begin = [], Stream.__init__

    def noting(self, model, cache, recomputed_columns=0):
        recomputed.append(recomputed_columns)
        begin(self, model, cache, recomputed_columns)

    monkeypatch.setattr(Stream, "__init__", noting)
    needs, on = [], forecast.Forecast.on
    monkeypatch.setattr(forecast.Forecast, "on", lambda *a: (needs.append(on(*a)[0]), on(*a))[1])
    settings = {"preset": "quality", "calibration": {"tokens": 4000, "batch_tokens": 256}}
    pruned(**settings)
    kept, without = needs[-3], needs[-2]
    assert without < kept
    free = (kept + without) // 2
    inner = forecast.check_memory
    monkeypatch.setattr(
        "rac_modifier.llmcompressor.pipeline.check_memory",
        lambda *args, **options: inner(*args, **options, free=lambda device: free),
    )
    pruned(**settings)
    assert recomputed == [0, WIDE]
