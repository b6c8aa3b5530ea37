"""The dense model's activations: where they wait, results are the same bits and fewer of them are kept."""

from __future__ import annotations

import pytest
import torch
from llmcompressor import oneshot
from transformers import AutoModelForCausalLM

from rac_modifier import ReasoningAwareSparseGPTModifier
from rac_modifier.llmcompressor.dense_stream import DenseStream
from tests.tiny import entry, linears


def pruned(folder, store, **settings):
    model = AutoModelForCausalLM.from_pretrained(folder)
    oneshot(model=model, recipe=ReasoningAwareSparseGPTModifier(**entry(store, **settings)))
    return model


@pytest.fixture
def waited(monkeypatch) -> list[str]:
    """The first module of each stage that is left."""
    found, inner = list[str](), DenseStream.leave

    def leave(self, stage):
        names = {module: name for name, module in self._model.named_modules()}
        found.append(names[stage.modules[0]])
        inner(self, stage)

    monkeypatch.setattr(DenseStream, "leave", leave)
    return found


@pytest.mark.parametrize(
    "settings", [{}, {"quantization": {"scheme": "W8A8"}}], ids=["pruned", "rounded"]
)
def test_a_stream_that_waits_gives_the_same_bits(
    tiny_folder, trace_store, waited, monkeypatch, settings
):
    late = pruned(tiny_folder, trace_store, preset="quality", **settings)
    assert waited == [f"model.layers.{layer}.mlp.gate_proj" for layer in (0, 1)], (
        "where down reads more than they do"
    )
    monkeypatch.setattr(DenseStream, "waits", lambda self, stage, after: False)
    at_once = pruned(tiny_folder, trace_store, preset="quality", **settings)
    assert len(waited) == 2
    for (name, ours), theirs in zip(linears(late).items(), linears(at_once).values(), strict=True):
        assert torch.equal(ours.weight, theirs.weight), name


def test_no_more_wide_inputs_are_kept_than_those_of_one_batch(
    tiny_folder, trace_store, waited, monkeypatch
):
    """128 numbers per token are down's inputs; of both streams, 64 are others'."""
    wide, inner = [], DenseStream.run

    def run(self, stage, batch):
        inner(self, stage, batch)
        values = [value.value for one in self.cache.batch_intermediates for value in one.values()]
        wide.append(sum(torch.is_tensor(value) and value.shape[-1] == 128 for value in values))

    monkeypatch.setattr(DenseStream, "run", run)
    pruned(
        tiny_folder,
        trace_store,
        preset="quality",
        calibration={"tokens": 1500, "batch_tokens": 256},
    )
    assert waited
    assert max(wide) == 1
    monkeypatch.setattr(DenseStream, "waits", lambda self, stage, after: False)
    wide.clear()
    pruned(
        tiny_folder,
        trace_store,
        preset="quality",
        calibration={"tokens": 1500, "batch_tokens": 256},
    )
    assert max(wide) > 3, "this can fail"
