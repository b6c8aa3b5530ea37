"""llm-compressor's linear experts."""

import inspect

import torch
from llmcompressor.modeling.moe import context
from llmcompressor.modeling.moe.linear_experts import (
    ExpertMLPWithGate,
    ExpertMLPWithoutGate,
    LinearExperts2D,
)
from llmcompressor.modeling.moe.linearize import linearize_moe
from llmcompressor.modifiers.pruning.reap import REAPPruningModifier
from llmcompressor.modifiers.pruning.reap.utils import REAPSaliencyTracker
from llmcompressor.pipelines.cache import IntermediatesCache
from transformers import AutoModelForCausalLM

from tests.tiny import EXPERTS, save_tiny_experts


def test_seam_experts_are_called_with_all_tokens_and_each_tokens_experts():
    called_with = list(inspect.signature(LinearExperts2D.forward).parameters)
    assert called_with == ["self", "hidden_states", "top_k_index", "top_k_weights"]


def test_seam_the_switch_is_a_variable_of_its_module(monkeypatch):
    assert context.get_calibrate_all_experts_flag() is False
    monkeypatch.setattr(context, "_CALIBRATE_ALL_EXPERTS", True)
    assert context.get_calibrate_all_experts_flag() is True
    with context.moe_calibration_context():
        assert context._CALIBRATE_ALL_EXPERTS is True


def test_seam_an_expert_is_gate_and_up_then_down(tmp_path):
    folder = save_tiny_experts(tmp_path, num_hidden_layers=1)
    model = linearize_moe(AutoModelForCausalLM.from_pretrained(folder))
    experts = model.model.layers[0].mlp.experts
    assert isinstance(experts, LinearExperts2D)
    assert experts.num_experts == EXPERTS < len(experts), "the activation is among the children"
    assert isinstance(experts[0], ExpertMLPWithGate)
    children = {name for name, _ in experts[0].named_children()}
    assert children == {"gate_proj", "up_proj", "down_proj"}
    assert "self.down_proj(" in inspect.getsource(ExpertMLPWithGate.forward)
    assert "self.down_proj(" in inspect.getsource(ExpertMLPWithoutGate.forward)


def test_seam_a_cache_holds_its_tensors_as_values_where_they_are_offloaded():
    cache = IntermediatesCache([{}], torch.device("cpu"))
    x = torch.ones(2, 3)
    cache.update(0, {"x": x})
    assert torch.equal(cache.batch_intermediates[0]["x"].value, x)


def test_seam_reap_holds_saliency_until_it_removes_a_layers_experts():
    reap = REAPPruningModifier(sparsity=0.5)
    assert (reap._saliency_trackers, reap._retained_experts) == ({}, {})
    tracker = REAPSaliencyTracker(2)
    assert tracker.total_count == 0
    norms = {0: torch.tensor([2.0, 4.0])}
    tracker.update(torch.tensor([[0], [0]]), torch.tensor([[1.0], [0.5]]), norms)
    assert (tracker.total_count, tracker.mean_saliency.tolist()) == (2, [2.0, 0.0])
    removing = inspect.getsource(REAPPruningModifier.on_sequential_epoch_end)
    assert "del self._saliency_trackers[" in removing
