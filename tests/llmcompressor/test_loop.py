"""A run against its definition: before each group, the whole model is run anew."""

import pytest
import torch
from llmcompressor.pipelines.cache import IntermediatesCache
from transformers import AutoModelForCausalLM

from rac_modifier.llmcompressor import statistics
from rac_modifier.llmcompressor.statistics import DenseStream
from tests.llmcompressor.definitions import (
    O_PROJ,
    QKV,
    assert_close,
    eager,
    given_to,
    prune_by_definition,
    run_on,
)
from tests.tiny import linears

MLP = [["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]]


@pytest.mark.usefixtures("float32_products")
@pytest.mark.parametrize(
    "settings",
    [
        {"reconstruct": "dense", "order": "group"},
        {"reconstruct": "pruned", "order": "group"},
        {"preset": "paper"},
    ],
    ids=str,
)
def test_it_is_pruning_each_group_on_a_model_run_anew(tiny_folder, trace_store, settings):
    """The paper's order takes all inputs of a layer while none of its modules is pruned."""
    model, expected, dense = eager(tiny_folder), eager(tiny_folder), eager(tiny_folder)
    modifier = run_on(model, trace_store, solver="sparsegpt", **settings)
    loader = modifier.calibration_set.loader
    for number in range(2):
        groups = [
            [f"model.layers.{number}.{name}" for name in group] for group in (QKV, O_PROJ, *MLP)
        ]
        before = eager(tiny_folder)
        before.load_state_dict(expected.state_dict())
        for names in groups:
            modules = [expected.get_submodule(name) for name in names]
            source = before if "preset" in settings else expected
            (x,), weights = given_to(source, source.get_submodule(names[0]), loader)
            x_dense = None
            if settings.get("reconstruct") == "dense":
                (x_dense,), _ = given_to(dense, dense.get_submodule(names[0]), loader)
            prune_by_definition(modules, x, x_dense, weights)
    assert_close(model, expected)


def test_a_dense_stream_that_waits_gives_the_same_bits_and_keeps_one_batch(
    tiny_folder, trace_store, monkeypatch
):
    wide: list[int] = []  # for each read of down's inputs, the batches of which they are kept
    inner = DenseStream.inputs

    def count(cache: IntermediatesCache) -> int:
        values = [value.value for batch in cache.batch_intermediates for value in batch.values()]
        return sum(torch.is_tensor(value) and value.shape[-1] == 128 for value in values)

    def inputs(self, stage, batch):
        x = inner(self, stage, batch)
        if x.shape[-1] == 128:
            wide.append(count(self.cache))
        return x

    def run():
        model = AutoModelForCausalLM.from_pretrained(tiny_folder)
        calibration = {"tokens": 1500, "batch_tokens": 256}
        run_on(model, trace_store, calibration=calibration, solver="sparsegpt")
        return model

    monkeypatch.setattr(DenseStream, "inputs", inputs)
    late = run()
    assert max(wide) == 1
    wide.clear()
    monkeypatch.setattr(statistics, "saves_by_waiting", lambda stage, after, tokens: False)
    kept = run()
    assert max(wide) > 3
    for (name, ours), theirs in zip(linears(late).items(), linears(kept).values(), strict=True):
        assert torch.equal(ours.weight, theirs.weight), name
