"""llm-compressor's calibration pipelines."""

import pytest
import torch
from compressed_tensors.registry.registry import _REGISTRY
from llmcompressor.core import create_session
from llmcompressor.pipelines.registry import CalibrationPipeline
from llmcompressor.pipelines.sequential.pipeline import SequentialPipeline

from rac_modifier import ReasoningAwareSparseGPTModifier
from rac_modifier.llmcompressor.pipeline import (
    ReasoningAwareSequentialPipeline,
    SessionRun,
    install_pipeline,
    remove_pipeline,
)
from rac_modifier.llmcompressor.upstream import contained_tracing
from tests.tiny import NAME, entry, linears, tiny_model


def test_seam_calibration_pipeline_registry_is_what_from_modifiers_loads():
    """While a run of ours lasts, "sequential" is ours, both when it is inferred and when the user
    names it."""
    ours = ReasoningAwareSparseGPTModifier(**entry())
    with create_session() as session:
        install_pipeline(session, SessionRun(None, None))
        try:
            for user in (None, "sequential", "Sequential"):
                made = CalibrationPipeline.from_modifiers([ours], user=user)
                assert type(made) is ReasoningAwareSequentialPipeline
            named = CalibrationPipeline.from_modifiers([ours], user="independent")
            assert type(named).__name__ == "IndependentPipeline"
        finally:
            remove_pipeline(session)
    assert _REGISTRY[CalibrationPipeline]["sequential"] is SequentialPipeline


def test_seam_no_other_pipeline_than_the_known_ones_is_registered():
    """A new one might calibrate without our loader."""
    known = {"basic", "datafree", "independent", "sequential"}
    assert set(CalibrationPipeline.registered_names()) == known


def test_seam_independent_pipeline_asks_from_modifiers_for_each_modifier(monkeypatch):
    from llmcompressor.core import active_session
    from llmcompressor.modifiers.quantization import GPTQModifier
    from llmcompressor.pipelines.independent.pipeline import IndependentPipeline

    asked = []

    def from_modifiers(modifiers, user=None):
        asked.append([type(m).__name__ for m in modifiers])
        # what pipeline.py reads the modifiers from
        assert active_session().lifecycle.recipe.modifiers == modifiers
        return lambda model, loader, args: None

    monkeypatch.setattr(CalibrationPipeline, "from_modifiers", from_modifiers)
    session = active_session()
    session.reset()
    session.lifecycle.recipe.modifiers = [
        ReasoningAwareSparseGPTModifier(**entry()),
        GPTQModifier(targets=["Linear"], scheme="W8A8"),
    ]
    try:
        IndependentPipeline.__call__(tiny_model(), None, None)
    finally:
        session.lifecycle.recipe.modifiers = []
        session.reset()
    assert asked == [[NAME], ["GPTQModifier"]]


def test_seam_partition_starts_a_subgraph_at_each_target():
    """Group order reads a target's input from the cache before its subgraph runs."""
    from llmcompressor.args import DatasetArguments
    from llmcompressor.pipelines.sequential.helpers import trace_subgraphs

    model = tiny_model()
    targets = list(linears(model))
    ids = torch.arange(2, 22).reshape(2, 10)
    ignore = DatasetArguments().tracing_ignore
    subgraphs = trace_subgraphs(model, {"input_ids": ids}, targets, ignore, 1)
    assert len(subgraphs) == len(targets) + 1
    for subgraph, target in zip(subgraphs[1:], targets, strict=True):
        (node,) = [n for n in subgraph.graph.nodes if n.op == "call_module" and n.target in targets]
        assert node.target == target
        assert node.args[0].op == "placeholder"
        assert node.args[0].name in subgraph.input_names


def test_seam_tracing_leaves_wrapped_functions():
    """If this fails: tracing cleans up after itself, and nothing of ours has to."""
    from llmcompressor.args import DatasetArguments
    from llmcompressor.pipelines.sequential.helpers import trace_subgraphs
    from torch.fx import _symbolic_trace

    wrapped = _symbolic_trace._wrapped_fns_to_patch
    model, before = tiny_model(), set(wrapped)
    sample, ignore = {"input_ids": torch.arange(2, 22).reshape(2, 10)}, DatasetArguments()
    with contained_tracing(model):
        trace_subgraphs(model, sample, [*linears(model)], ignore.tracing_ignore, 1)
        assert wrapped.keys() - before
    assert set(wrapped) == before


@pytest.mark.skipif(torch.accelerator.is_available(), reason="memory can be pinned")
def test_seam_a_cache_pins_memory_without_an_accelerator_too():
    """If this fails: AWQModifier runs on a CPU as it is."""
    from llmcompressor.pipelines.cache import IntermediatesCache

    cache = IntermediatesCache([{}], torch.device("cpu"))
    cache.update(0, {"x": torch.ones(2)})
    with pytest.raises(RuntimeError, match="accelerator"):
        cache.pin_memory(0)
