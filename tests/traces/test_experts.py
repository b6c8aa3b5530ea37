from collections import Counter

import pytest
import torch
from transformers import AutoModelForCausalLM

from rac_modifier.errors import RacError
from rac_modifier.traces.experts import describe_experts, tokens_per_expert
from rac_modifier.traces.store import TraceStore
from tests.tiny import save_tiny_experts


@pytest.fixture
def experts(tmp_path):
    return save_tiny_experts(tmp_path / "experts")


def test_each_choice_of_a_router_is_counted(experts, trace_store):
    """The reference reads the indices that the routers hand to their experts."""
    model = AutoModelForCausalLM.from_pretrained(experts)
    traces = list(TraceStore.read(trace_store))
    chosen = [Counter() for _ in model.model.layers]
    for layer, counter in zip(model.model.layers, chosen, strict=True):
        layer.mlp.gate.register_forward_hook(
            lambda _module, _inputs, output, counter=counter: counter.update(
                output[2].flatten().tolist()
            )
        )
    for most in (10**6, 100):
        for counter in chosen:
            counter.clear()
        counts, tokens = tokens_per_expert(model, traces, most)
        assert tokens == min(most, sum(trace.tokens for trace in traces))
        assert counts.tolist() == [
            [counter[e] for e in range(counts.shape[1])] for counter in chosen
        ]
    with pytest.raises(RacError, match="the store holds no traces"):
        tokens_per_expert(model, [], 100)
    model.config.n_group = 2
    with pytest.raises(RacError, match=r"within 2 groups of experts .*; leave --experts out"):
        tokens_per_expert(model, traces, 100)


def test_the_budget_is_that_of_the_least_used_expert():
    lines = describe_experts(torch.tensor([[300, 100], [350, 64]]), 200)
    assert "an expert reads 64 (expert 1 of layer 1) to 350 of 200 tokens" in lines[0]
    assert lines[1] == "budget      1,600 tokens give every expert 512"
    assert "1 read nothing" in describe_experts(torch.tensor([[400, 0]]), 200)[1]
