"""What this package takes for granted about llm-compressor, a test a seam: an upgrade that moves one fails here, by name."""

import inspect
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from rac_modifier.llmcompressor.modifiers import ReasoningAwareSparseGPTModifier

import rac_modifier  # noqa: F401
from rac_modifier.llmcompressor import pipeline as seam
from tests.tiny import NAME, entry, linears, recipe, tiny_model

PYPROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
EXTRAS = PYPROJECT["project"]["optional-dependencies"]
REQUIREMENTS = [Requirement(r) for r in (*PYPROJECT["project"]["dependencies"], *EXTRAS["compress"], *EXTRAS["eval"])]


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=lambda r: r.name)
def test_seam_versions_in_pyproject_contain_what_is_installed(requirement):
    assert requirement.specifier.contains(metadata.version(requirement.name), prereleases=True)


def test_seam_modifier_factory_register_is_found_by_a_yaml_recipe():
    from llmcompressor.recipe import Recipe

    modifiers = Recipe.create_instance(recipe(entry())).modifiers
    assert [type(m) for m in modifiers] == [ReasoningAwareSparseGPTModifier]


def test_seam_modifier_factory_refresh_keeps_registered_modifiers():
    """Its docstring says that it clears them."""
    from llmcompressor.modifiers import ModifierFactory

    ModifierFactory.refresh()
    assert ModifierFactory._registered_registry[NAME] is ReasoningAwareSparseGPTModifier


@pytest.mark.parametrize(
    "text",
    [
        "pruning: {pruning_modifiers: {%s: {sparsity: 0.5}}}",
        "pruning_stage: {pruning: {%s: {sparsity: 0.5}}}",
    ],
)
def test_seam_recipe_without_suffixes_silently_has_no_modifier(text):
    """Why recipe.py refuses such a recipe; when upstream does, that check can go."""
    from llmcompressor.recipe import Recipe

    assert Recipe.create_instance(text % NAME).modifiers == []


def test_seam_calibration_pipeline_registry_is_what_from_modifiers_loads():
    from compressed_tensors.registry.registry import _REGISTRY
    from llmcompressor.pipelines.registry import CalibrationPipeline

    assert _REGISTRY[CalibrationPipeline]["sequential"] is seam.ReasoningAwareSequentialPipeline
    assert _REGISTRY[CalibrationPipeline]["basic"] is seam.ReasoningAwareBasicPipeline
    ours = ReasoningAwareSparseGPTModifier(**entry())
    assert type(CalibrationPipeline.from_modifiers([ours])) is seam.ReasoningAwareSequentialPipeline
    assert type(CalibrationPipeline.from_modifiers([ours], user="sequential")) is seam.ReasoningAwareSequentialPipeline
    assert type(CalibrationPipeline.from_modifiers([ours], user="basic")) is seam.ReasoningAwareBasicPipeline
    assert type(CalibrationPipeline.from_modifiers([ours], user="independent")).__name__ == "IndependentPipeline"


def test_seam_no_other_pipeline_than_the_known_ones_is_registered():
    """A new one might calibrate without our loader."""
    from llmcompressor.pipelines.registry import CalibrationPipeline

    assert set(CalibrationPipeline.registered_names()) == {"basic", "datafree", "independent", "sequential"}


def test_seam_independent_pipeline_asks_from_modifiers_for_each_modifier(monkeypatch):
    from llmcompressor.core import active_session
    from llmcompressor.modifiers.quantization import GPTQModifier
    from llmcompressor.pipelines.independent.pipeline import IndependentPipeline
    from llmcompressor.pipelines.registry import CalibrationPipeline

    asked = []

    def from_modifiers(modifiers, user=None):
        asked.append([type(m).__name__ for m in modifiers])
        assert active_session().lifecycle.recipe.modifiers == modifiers  # what seam.py reads the modifiers from
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


def test_seam_state_data_calib_is_there_and_kept_as_it_is():
    from llmcompressor.core import active_session
    from llmcompressor.core.state import State

    state = State()
    assert state.data.calib is None
    marker = object()
    state.data.calib = marker
    state.update(model=torch.nn.Linear(1, 1), calib_data=None, start=-1)
    assert state.data.calib is marker
    session = active_session()
    session.state.data.calib = marker
    assert session.lifecycle.state.data.calib is marker
    session.reset()
    assert session.state.data.calib is None


def test_seam_state_current_batch_idx():
    from llmcompressor.core.state import State

    assert State().current_batch_idx == -1


@pytest.mark.parametrize("pipeline", ["SequentialPipeline", "BasicPipeline"])
def test_seam_pipeline_signature(pipeline):
    from llmcompressor.pipelines.basic.pipeline import BasicPipeline
    from llmcompressor.pipelines.sequential.pipeline import SequentialPipeline

    call = {"SequentialPipeline": SequentialPipeline, "BasicPipeline": BasicPipeline}[pipeline].__call__
    assert list(inspect.signature(call).parameters) == ["model", "dataloader", "dataset_args"]


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
        model, {"input_ids": ids}, targets, args.tracing_ignore, args.sequential_targets_per_subgraph
    )
    assert len(subgraphs) == 3  # a layer each, and one for what comes before or behind
    assert {m for s in subgraphs for m in s.submodules(model)} >= set(model.model.layers.modules()) - {
        model.model.layers
    }
    values, logits = {"input_ids": torch.cat([ids, ids])}, []  # the number of rows must not be baked in
    with torch.no_grad():
        expected = model(**values).logits
        model.lm_head.register_forward_hook(lambda module, args, output: logits.append(output))
        for subgraph in subgraphs:
            outputs = subgraph.forward(model, **{name: values[name] for name in subgraph.input_names})
            values = {k: v for k, v in {**values, **outputs}.items() if k not in subgraph.consumed_names}
    torch.testing.assert_close(logits, [expected])


def test_seam_dataset_arguments_that_the_lean_pipeline_reads():
    from llmcompressor.args import DatasetArguments

    args = DatasetArguments()
    assert args.sequential_offload_device == "cpu"
    assert args.sequential_targets is None
    assert args.sequential_targets_per_subgraph == 1
    assert isinstance(args.tracing_ignore, list)


def test_seam_intermediates_cache():
    from llmcompressor.pipelines.cache import IntermediatesCache

    cpu = torch.device("cpu")
    batches = [{"input_ids": torch.ones(1, n, dtype=torch.long)} for n in (3, 5)]
    cache = IntermediatesCache.from_dataloader(batches, cpu, cpu)
    assert [b["input_ids"].shape[1] for b in cache.iter({"input_ids"})] == [3, 5]
    cache.update(1, {"hidden": torch.zeros(2)})
    cache.delete(1, {"input_ids"})
    assert list(cache.fetch(1, {"hidden", "input_ids"})) == ["hidden"]
    assert list(cache.fetch(0, {"input_ids"})) == ["input_ids"]


def test_seam_hooks_mixin_registers_and_disables_a_forward_pre_hook():
    from llmcompressor.modifiers.utils.hooks import HooksMixin

    modifier, module, seen = ReasoningAwareSparseGPTModifier(**entry()), torch.nn.Linear(2, 2), []
    modifier.register_hook(module, lambda m, args: seen.append(args), "forward_pre")
    module(torch.ones(1, 2))
    with HooksMixin.disable_hooks():
        module(torch.ones(1, 2))
    assert len(seen) == 1
    modifier.remove_hooks()
    module(torch.ones(1, 2))
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("on_initialize", ["self", "state"]),
        ("on_calibration_start", ["self", "state", "event"]),
        ("on_sequential_epoch_end", ["self", "state", "event", "modules"]),
        ("on_calibration_end", ["self", "state", "event"]),
        ("on_finalize", ["self", "state"]),
    ],
)
def test_seam_modifier_lifecycle_hooks(name, parameters):
    from llmcompressor.modifiers import Modifier

    assert list(inspect.signature(getattr(Modifier, name)).parameters)[: len(parameters)] == parameters


def test_seam_modifier_has_no_method_of_a_name_that_is_ours():
    from llmcompressor.modifiers import Modifier

    ours = {"calibrated_modules", "describe_modules", "needs_dense_stream", "on_subgraph_start", "prune_group"}
    ours |= {
        "calibrate_session",
        "calibration_set",
        "check_run",
        "other_modifiers",
        "quantization",
        "run_record",
        "use_calibration_set",
        "use_order",
        "weights_for",
        "order",
        "preset",
        "reconstruct",
        "solver",
        "token_weights",
    }
    assert not ours & set(dir(Modifier))


def test_seam_partition_starts_a_subgraph_at_each_target():
    """Group order reads a target's input from the cache before its subgraph runs, so it must be one of its placeholders."""
    from llmcompressor.args import DatasetArguments
    from llmcompressor.pipelines.sequential.helpers import trace_subgraphs

    model = tiny_model()
    targets = list(linears(model))
    ids = torch.arange(2, 22).reshape(2, 10)
    subgraphs = trace_subgraphs(model, {"input_ids": ids}, targets, DatasetArguments().tracing_ignore, 1)
    assert len(subgraphs) == len(targets) + 1
    for subgraph, target in zip(subgraphs[1:], targets, strict=True):
        (node,) = [n for n in subgraph.graph.nodes if n.op == "call_module" and n.target in targets]
        assert node.target == target
        assert node.args[0].op == "placeholder"
        assert node.args[0].name in subgraph.input_names


def test_seam_lifecycle_callbacks():
    from llmcompressor.core import LifecycleCallbacks

    for name in ("calibration_start", "sequential_epoch_end", "calibration_end"):
        assert callable(getattr(LifecycleCallbacks, name))


def test_seam_modify_save_pretrained_leaves_a_marked_one_alone():
    from llmcompressor.transformers.compression.compressed_tensors_utils import modify_save_pretrained

    model = tiny_model()
    modify_save_pretrained(model)
    assert model.save_pretrained._overridden is True
    marked = model.save_pretrained
    modify_save_pretrained(model)
    assert model.save_pretrained is marked


def test_seam_post_process_calls_save_pretrained_with_save_compressed(tmp_path):
    from types import SimpleNamespace

    from llmcompressor.entrypoints.utils import post_process

    calls = []
    model = SimpleNamespace(save_pretrained=lambda *args, **kwargs: calls.append((args, kwargs)))
    post_process(SimpleNamespace(model=model, processor=None, save_compressed=False), None, str(tmp_path))
    assert calls == [((str(tmp_path),), {"save_compressed": False})]


def test_seam_oneshot_resets_the_session_before_it_starts():
    """A calibration set left in the session by an earlier run would look like a dataset given by the user."""
    from llmcompressor.entrypoints.oneshot import Oneshot

    source = inspect.getsource(Oneshot.apply_recipe_modifiers)
    assert source.index("session.reset()") < source.index("session.initialize(")


def test_seam_offloaded_weights_are_updated_through_compressed_tensors():
    from compressed_tensors.utils import align_module_device, update_offload_parameter

    module = torch.nn.Linear(2, 2, bias=False)
    with align_module_device(module):
        update_offload_parameter(module, "weight", torch.eye(2))
    assert torch.equal(module.weight, torch.eye(2))


def test_seam_match_named_modules_takes_names_classes_and_patterns():
    from compressed_tensors.utils import match_named_modules

    model = tiny_model()
    assert len(list(match_named_modules(model, ["Linear"]))) == 15
    assert [n for n, _ in match_named_modules(model, ["lm_head"])] == ["lm_head"]
    some = [n for n, _ in match_named_modules(model, ["re:.*q_proj$"], ["re:.*layers.0.*"])]
    assert some == ["model.layers.1.self_attn.q_proj"]


def test_seam_upstream_sparsegpt_takes_an_nm_structure_as_n_pruned():
    from llmcompressor.modifiers.pruning import SparseGPTModifier

    modifier = SparseGPTModifier(sparsity=0.25, mask_structure="1:4")
    assert (modifier._prune_n, modifier._prune_m) == (1, 4)


def test_seam_quantization_modifier_attaches_schemes_without_being_run():
    """What modifier/quantizing.py uses of it, and what it leaves on a module."""
    from compressed_tensors.quantization import QuantizationStatus
    from llmcompressor.modifiers.quantization import QuantizationModifier

    model = tiny_model()
    upstream = QuantizationModifier(scheme="W8A8", ignore=["lm_head"])
    upstream.initialize_quantization(model)
    module = model.model.layers[0].mlp.up_proj
    assert module.weight_scale.shape == (128, 1)
    assert module.weight_zero_point.shape == (128, 1)
    assert not module.quantization_enabled
    assert not hasattr(model.lm_head, "quantization_scheme")
    upstream.end_calibration(model)
    assert module.quantization_enabled
    assert module.quantization_status == QuantizationStatus.FROZEN < QuantizationStatus.COMPRESSED


def test_seam_the_recipe_is_in_the_session_when_a_modifier_is_initialized(tiny_folder, monkeypatch):
    """From it follows what comes after pruning."""
    from llmcompressor import oneshot
    from llmcompressor.core import active_session
    from llmcompressor.modifiers.quantization import QuantizationModifier

    seen = []
    original = QuantizationModifier.on_initialize

    def spy(self, state, **kwargs):
        seen.append([m is self for m in active_session().lifecycle.recipe.modifiers])
        return original(self, state, **kwargs)

    monkeypatch.setattr(QuantizationModifier, "on_initialize", spy)
    made = [
        QuantizationModifier(scheme="W8A8", targets=[t], ignore=["lm_head"]) for t in ("re:.*q_proj", "re:.*k_proj")
    ]
    oneshot(model=str(tiny_folder), recipe=made)
    assert seen == [[True, False], [False, True]]


def test_seam_a_compressor_takes_a_wider_weight_than_the_modules():
    """Weights are widened to float32 before they are divided by their scales."""
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.quantization import preset_name_to_scheme

    scheme = preset_name_to_scheme("W8A8", ["Linear"])
    name = infer_module_format(torch.nn.Linear, scheme).value
    assert name == "int-quantized"
    codes = torch.tensor([[127.0, -127.0, 65.0, 0.0]])
    scale = torch.tensor([[1.0546875]], dtype=torch.bfloat16)
    state = {
        "weight": (codes * scale.float()).bfloat16(),
        "weight_scale": scale,
        "weight_zero_point": torch.zeros(1, 1),
    }
    compress = BaseCompressor.get_value_from_registry(name).compress
    exact = compress({**state, "weight": state["weight"].float()}, scheme)["weight"]
    assert torch.equal(exact.float(), codes)
    assert "weight_zero_point" not in compress(state, scheme)
