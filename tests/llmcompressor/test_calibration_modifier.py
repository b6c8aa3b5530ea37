"""Calibration for other modifiers' sake, and what both modifiers share."""

import json

import pytest
import torch
from accelerate import dispatch_model
from llmcompressor.core import create_session
from llmcompressor.core.state import State
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import PreTrainedModel

from rac_modifier import RacError, ReasoningAwareSparseGPTModifier
from rac_modifier.calibration.trace_pool import _hold_out
from rac_modifier.evaluation import activations
from rac_modifier.measure.divergence import DenseReference
from rac_modifier.runtime import models as model_tools
from rac_modifier.traces.store import TraceStore
from tests.llmcompressor.conftest import fp8, int8_head, record_of
from tests.llmcompressor.modifier_helpers import generic_loader, int4
from tests.measure.test_divergence import reference
from tests.tiny import TOKENS, entry, is_2of4, linears


def test_a_recipe_without_a_modifier_that_calibrates_is_refused(calibrate):
    for later, says in (([], "nothing else"), ([fp8()], "QuantizationModifier")):
        with pytest.raises(RacError, match=f"calibrates nothing: the recipe has {says}"):
            calibrate(later=later)


def test_a_session_with_calibration_data_is_refused(dense):
    """Without `oneshot`, which has the argument under another name."""
    state = State(model=dense)
    state.data.calib = generic_loader()
    with create_session(), pytest.raises(RacError, match="leave calib_data out"):
        ReasoningAwareSparseGPTModifier(**entry()).initialize(state)


# divergence on held-out traces


@pytest.fixture(scope="module")
def held(prune, tmp_path_factory):
    """A run that holds traces of a store of its own out: folder, model, settings."""
    folder = tmp_path_factory.mktemp("held")
    settings = entry(folder / "own.jsonl")
    calibration = {**settings["calibration"], "held_out_tokens": 300}
    settings = {"traces": settings["traces"], "calibration": calibration}
    return folder, prune(output_dir=folder / "out", **settings), settings


def test_the_record_holds_what_measuring_again_measures(held, dense):
    folder, model, _ = held
    measured = record_of(folder / "out")["divergence"]
    held_out = []
    others = list(_hold_out(TraceStore.read(folder / "own.jsonl"), 300, held_out))
    assert sum(t.tokens for t in others) >= TOKENS
    sequences = [((*t.prompt_ids, *t.completion_ids), len(t.prompt_ids)) for t in held_out]
    kls, agrees = map(torch.cat, reference(dense, model, sequences))
    assert measured["kl"] == pytest.approx(float(kls.mean()), rel=1e-3)
    assert measured["agreement"] == pytest.approx(float(agrees.mean()))
    assert measured["sequences"] == len(held_out)
    card = (folder / "out" / "README.md").read_text()
    assert f"{measured['kl']:.3f} nats per token" in card


def test_a_rounded_head_counts(prune, held, tmp_path):
    kl = []
    for folder, later in ((tmp_path / "dense", []), (tmp_path / "int8", [int8_head()])):
        prune(quantization=int4(), later=later, output_dir=folder, **held[2])
        kl.append(record_of(folder)["divergence"]["kl"])
    assert kl[0] != kl[1]


@pytest.fixture(scope="module")
def mixed(prune, held):
    """Rounded, attention to int8 and the others to int4; the model is not compressed."""
    int8 = {"targets": ["re:.*self_attn.*"], "weights": {"num_bits": 8, "strategy": "channel"}}
    groups = {"int8": int8, **int4(targets=("re:.*mlp.*",))["config_groups"]}
    settings = {"solver": "none", "mask_structure": None, "quantization": {"config_groups": groups}}
    return prune(**settings, **held[2])


def test_activations_get_8_bits_where_these_cost_a_tenth_of_what_rounding_costs(mixed, tmp_path):
    """Of the own errors of the run; tests/evaluation/test_activations.py has the errors."""
    mixed.save_pretrained(tmp_path / "out")
    record, chosen = record_of(tmp_path / "out"), set()
    assert record["activations"]["limit"] == 0.1
    own = {module["name"]: module["relative_error"] for module in record["modules"]}
    for name, measured in record["activations"]["layers"].items():
        assert measured["own_error"] == own[name]
        chosen |= {name} if measured["error"] <= 0.1 * own[name] else set()
    assert chosen == {name for name in own if "mlp" in name}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert set(config["rac_sparsity"]["int8_activations"]) == chosen


def test_activations_keep_16_bits_where_8_cannot_be_measured(prune, held, monkeypatch, tmp_path):
    def fails(*arguments):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(activations, "_measure_activations", fails)
    prune(quantization=int4(), output_dir=tmp_path / "out", **held[2])
    record = record_of(tmp_path / "out")
    assert "activations" not in record
    assert record["divergence"]["kl"] > 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "int8_activations" not in config["rac_sparsity"]


def test_what_is_not_measured_says_why_and_costs_no_model(
    prune, pruned, held, monkeypatch, tmp_path
):
    assert "no traces were held out" in pruned.record["divergence"]["not_measured"]

    def fails(self, pruned, **options):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(DenseReference, "divergence", fails)
    model = prune(output_dir=tmp_path / "out", **held[2])
    assert record_of(tmp_path / "out")["divergence"] == {"not_measured": "out of memory"}
    assert all(is_2of4(m.weight) for m in linears(model).values())


def test_rounding_counts_where_an_onloaded_weight_is_a_copy(prune, held, copies, tmp_path):
    """compressed-tensors rounds the copy that it reads, and torch reads another."""
    rounding = QuantizationModifier(ignore=["lm_head"], **int4(3))
    prune(output_dir=tmp_path / "out", later=[rounding], storage="dense", **held[2])
    kl = record_of(tmp_path / "out")["divergence"]["kl"]
    assert kl > 1.05 * record_of(held[0] / "out")["divergence"]["kl"]


@pytest.fixture
def accelerator(monkeypatch):
    """The CPU in the part of an accelerator without room for the model as a whole."""
    monkeypatch.setattr(model_tools, "accelerator", lambda: torch.device("cpu"))
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: None)
    monkeypatch.setattr(model_tools, "free_bytes", lambda device: 0)
    monkeypatch.setattr(
        PreTrainedModel, "to", lambda self, device: pytest.fail(f"moved to {device}")
    )


def test_a_model_larger_than_the_accelerator_is_measured_as_any_other(
    prune, held, tmp_path, accelerator
):
    """Its weights are streamed, and the record is that of a run without an accelerator."""
    prune(output_dir=tmp_path / "streamed", **held[2])
    streamed, plain = (record_of(path) for path in (tmp_path / "streamed", held[0] / "out"))
    assert streamed["divergence"] == plain["divergence"]
    prune(output_dir=tmp_path / "rounded", quantization=int4(), **held[2])
    assert record_of(tmp_path / "rounded")["activations"]["layers"].keys() == {
        module["name"] for module in streamed["modules"]
    }


@pytest.mark.usefixtures("accelerator")
def test_a_dispatched_model_stays_where_it_is(prune, dense):
    """Placed by accelerate, of which oneshot makes offloading of compressed-tensors."""
    dispatch_model(dense, device_map={"": "cpu"}, force_hooks=True)
    dense.hf_device_map = {"": "cpu"}
    assert all(is_2of4(m.weight) for m in linears(prune(model=dense)).values())
