"""Errors of layers, next to those of upstream's SparseGPT on the same batches."""

import pytest
import torch
from llmcompressor import oneshot
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from rac_modifier.calibration.calibration_set import build_calibration_set
from rac_modifier.settings.calibration import CalibrationSettings
from rac_modifier.settings.traces import TraceSettings
from tests.llmcompressor.modifier_helpers import upstreams_sparsegpt
from tests.tiny import entry, linears


def inputs_of(model, batches) -> dict[str, torch.Tensor]:
    """What each linear layer of the model reads, [tokens, columns]."""
    rows = {name: [] for name in linears(model)}
    handles = [
        module.register_forward_pre_hook(
            lambda m, args, name=name: rows[name].append(args[0].flatten(0, -2))
        )
        for name, module in linears(model).items()
    ]
    with torch.no_grad():
        for batch in batches:
            model(input_ids=batch["input_ids"])
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in rows.items()}


def relative_errors(model, dense, inputs) -> dict[str, float]:
    """||W X - W' X||^2 / ||W X||^2 of each linear layer, X as the dense model has it."""
    errors = {}
    for name, module in linears(dense).items():
        wanted = inputs[name] @ module.weight.detach().T
        change = wanted - inputs[name] @ model.get_submodule(name).weight.detach().T
        errors[name] = float(change.square().sum() / wanted.square().sum())
    return errors


STRUCTURES = [{"mask_structure": "2:4"}, {"mask_structure": "0:0", "sparsity": 0.5}]


@pytest.mark.parametrize("structure", STRUCTURES)
def test_no_worse_than_upstreams_sparsegpt_on_the_same_batches(
    tiny_folder, trace_store, dense, prune, structure
):
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    options = entry(trace_store)
    loader = build_calibration_set(
        dense, tokenizer, TraceSettings(**options["traces"]),
        CalibrationSettings(**options["calibration"]),
    ).loader.unpadded()  # fmt: skip
    ours = prune(preset="paper", **structure)
    upstream = oneshot(
        model=str(tiny_folder),
        recipe=upstreams_sparsegpt(structure["mask_structure"]),
        dataset=DataLoader([{"input_ids": b["input_ids"][0]} for b in loader], batch_size=1),
        num_calibration_samples=len(loader),
    )
    for name in linears(dense):
        mine, theirs = (m.get_submodule(name).weight for m in (ours, upstream))
        same = float(((mine == 0) == (theirs == 0)).float().mean())
        assert same >= (0.99 if "layers.0" in name else 0.95), (name, same)
    inputs = inputs_of(dense, loader)
    mine, theirs = relative_errors(ours, dense, inputs), relative_errors(upstream, dense, inputs)
    for name, error in theirs.items():
        assert mine[name] <= error * 1.02, name
    assert sum(mine.values()) <= sum(theirs.values()) * 1.005
    magnitude = prune(preset="paper", solver="magnitude", **structure)
    assert sum(mine.values()) < 0.8 * sum(relative_errors(magnitude, dense, inputs).values())
