"""llm-compressor's calibration pipelines."""

import torch
from compressed_tensors.registry.registry import _REGISTRY
from llmcompressor.core import create_session
from llmcompressor.pipelines.registry import CalibrationPipeline
from llmcompressor.pipelines.sequential.pipeline import SequentialPipeline

from rac_modifier import ReasoningAwareSparseGPTModifier
from rac_modifier.llmcompressor.pipeline import (
    ReasoningAwareSequentialPipeline,
    SessionRun,
    put_in_place,
    take_away,
)
from tests.tiny import NAME, entry, linears, tiny_model


def test_seam_calibration_pipeline_registry_is_what_from_modifiers_loads():
    """While a run of ours lasts, "sequential" is ours, both when it is inferred and when the user
    names it."""
    ours = ReasoningAwareSparseGPTModifier(**entry())
    with create_session() as session:
        put_in_place(session, SessionRun(None, None))
        try:
            for user in (None, "sequential", "Sequential"):
                made = CalibrationPipeline.from_modifiers([ours], user=user)
                assert type(made) is ReasoningAwareSequentialPipeline
            named = CalibrationPipeline.from_modifiers([ours], user="independent")
            assert type(named).__name__ == "IndependentPipeline"
        finally:
            take_away(session)
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
