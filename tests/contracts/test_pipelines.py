"""llm-compressor's calibration pipelines: how one is chosen and called, and what our loops use of
them."""

import inspect
from types import SimpleNamespace

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
from tests.llmcompressor.modifier_helpers import int4
from tests.tiny import NAME, entry, linears, tiny_model


def test_seam_calibration_pipeline_registry_is_what_from_modifiers_loads():
    """While a run of ours lasts, "sequential" is ours, both when it is inferred and when the user
    names it."""
    ours = ReasoningAwareSparseGPTModifier(**entry())
    with create_session() as session:
        put_in_place(session, SessionRun(ours, None, None))
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
    assert set(CalibrationPipeline.registered_names()) == {
        "basic",
        "datafree",
        "independent",
        "sequential",
    }


def test_seam_independent_pipeline_asks_from_modifiers_for_each_modifier(monkeypatch):
    from llmcompressor.core import active_session
    from llmcompressor.modifiers.quantization import GPTQModifier
    from llmcompressor.pipelines.independent.pipeline import IndependentPipeline

    asked = []

    def from_modifiers(modifiers, user=None):
        asked.append([type(m).__name__ for m in modifiers])
        assert (
            active_session().lifecycle.recipe.modifiers == modifiers
        )  # what pipeline.py reads the modifiers from
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


def test_seam_trace_subgraphs_signature_and_subgraph_interface():
    from llmcompressor.args import DatasetArguments
    from llmcompressor.pipelines.sequential.helpers import trace_subgraphs
    from llmcompressor.utils.pytorch.module import infer_sequential_targets

    assert list(inspect.signature(trace_subgraphs).parameters) == [
        "model", "sample_input", "sequential_targets", "ignore", "targets_per_subgraph",
    ]  # fmt: skip
    model, args = tiny_model(), DatasetArguments()
    targets = infer_sequential_targets(model, args.sequential_targets)
    ids = torch.arange(2, 22).reshape(2, 10)
    subgraphs = trace_subgraphs(
        model,
        {"input_ids": ids},
        targets,
        args.tracing_ignore,
        args.sequential_targets_per_subgraph,
    )
    assert len(subgraphs) == 3  # one per layer, and one for what comes before or after
    assert {m for s in subgraphs for m in s.submodules(model)} >= set(
        model.model.layers.modules()
    ) - {model.model.layers}
    values, logits = (
        {"input_ids": torch.cat([ids, ids])},
        [],
    )  # the number of rows must not be baked in
    with torch.no_grad():
        expected = model(**values).logits
        model.lm_head.register_forward_hook(lambda module, args, output: logits.append(output))
        for subgraph in subgraphs:
            outputs = subgraph.forward(
                model, **{name: values[name] for name in subgraph.input_names}
            )
            values = {
                k: v for k, v in {**values, **outputs}.items() if k not in subgraph.consumed_names
            }
    torch.testing.assert_close(logits, [expected])


def test_seam_partition_starts_a_subgraph_at_each_target():
    """Group order reads a target's input from the cache before its subgraph runs, so it must be one
    of its placeholders."""
    from llmcompressor.args import DatasetArguments
    from llmcompressor.pipelines.sequential.helpers import trace_subgraphs

    model = tiny_model()
    targets = list(linears(model))
    ids = torch.arange(2, 22).reshape(2, 10)
    subgraphs = trace_subgraphs(
        model, {"input_ids": ids}, targets, DatasetArguments().tracing_ignore, 1
    )
    assert len(subgraphs) == len(targets) + 1
    for subgraph, target in zip(subgraphs[1:], targets, strict=True):
        (node,) = [n for n in subgraph.graph.nodes if n.op == "call_module" and n.target in targets]
        assert node.target == target
        assert node.args[0].op == "placeholder"
        assert node.args[0].name in subgraph.input_names


def test_seam_autoround_takes_the_positions_of_the_first_sequence_for_all():
    """Padded with zeros to the longest one, as llm-compressor does. Once that and the next seam are
    mended, AutoRound needs no `CalibrationLoader.joined`."""
    from auto_round.algorithms.block_runner import BlockForwardRunner
    from auto_round.utils import SHARED_CACHE_KEYS
    from llmcompressor.modifiers.autoround import AutoRoundModifier

    assert "position_embeddings" in SHARED_CACHE_KEYS
    assert (AutoRoundModifier().iters, AutoRoundModifier().batch_size) == (
        200,
        8,
    )  # what `rac frontier --check` counts
    short, long = ((torch.zeros(1, length, 4),) for length in (2, 5))
    cosine = [{"position_embeddings": (torch.ones(1, length, 2),)} for length in (2, 5)]
    padded, _ = AutoRoundModifier()._pad_captured_inputs(
        list(zip((short, long), cosine, strict=True))
    )
    others = {"position_embeddings": [kwargs["position_embeddings"] for _, kwargs in padded]}
    runner = SimpleNamespace(batch_dim=0, shared_cache_keys=SHARED_CACHE_KEYS)
    _, chosen = BlockForwardRunner._select_batch(
        runner, [args[0] for args, _ in padded], others, torch.tensor([0, 1])
    )
    assert chosen["position_embeddings"][0][0, :, 0].tolist() == [1, 1, 0, 0, 0]


def test_seam_autoround_counts_padding_in_its_loss(monkeypatch, tiny_folder):
    """llm-compressor sets `attention_mask` on AutoRound, which takes the mask from token ids that
    it is not given."""
    from auto_round.algorithms.quantization.sign_round.quantizer import SignRoundQuantizer
    from llmcompressor import oneshot
    from llmcompressor.modifiers.autoround import AutoRoundModifier

    masks, get_loss = [], SignRoundQuantizer._get_loss

    def recorded(self, *args, **kwargs):
        masks.append(
            inspect.signature(get_loss)
            .bind(self, *args, **kwargs)
            .arguments.get("valid_token_mask")
        )
        return get_loss(self, *args, **kwargs)

    monkeypatch.setattr(SignRoundQuantizer, "_get_loss", recorded)
    ragged = torch.utils.data.DataLoader(
        [{"input_ids": torch.arange(3, 3 + n)[None]} for n in (4, 9)], batch_size=None
    )
    settings = {"iters": 1, "enable_torch_compile": False, "ignore": ["lm_head"], "batch_size": 2}
    oneshot(
        model=str(tiny_folder), dataset=ragged, recipe=[AutoRoundModifier(**settings, **int4())]
    )
    assert masks
    assert set(masks) == {None}


def test_seam_autoround_loses_its_zero_points(tiny_folder):
    """They stay those that llm-compressor began with, 0. Once that is mended, the pipeline need not
    refuse them."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.autoround import AutoRoundModifier

    weights = {"num_bits": 3, "strategy": "group", "group_size": 32, "symmetric": False}
    settings = {"iters": 1, "enable_torch_compile": False, "ignore": ["lm_head"], "batch_size": 2}
    groups = {"w": {"targets": ["Linear"], "weights": weights}}
    data = torch.utils.data.DataLoader(
        [{"input_ids": torch.arange(3, 12)[None]}] * 2, batch_size=None
    )
    model = oneshot(
        model=str(tiny_folder),
        dataset=data,
        recipe=[AutoRoundModifier(**settings, config_groups=groups)],
    )
    rounded = [module for name, module in linears(model).items() if name != "lm_head"]
    assert not any(module.weight_zero_point.any() for module in rounded)
