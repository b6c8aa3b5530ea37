"""A run that chooses the layers with activations of 8 bits: measured on held-out traces, recorded as `rac activations` does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from rac_modifier.calibration.trace_pool import HoldOut
from rac_modifier.checkpoint.load import load_model
from rac_modifier.checkpoint.sparsity_config import SparsityRecord
from rac_modifier.errors import RacError
from rac_modifier.evaluation.activations import choose_activations, layers_of
from rac_modifier.evaluation.teacher_forcing import sequence_of
from rac_modifier.traces.store import TraceStore
from tests.llmcompressor.modifier_helpers import int4
from tests.tiny import entry, linears, save_tiny_experts

INT8 = {"config_groups": {"g": {"weights": {"num_bits": 8, "strategy": "channel"}}}}
FIRST = "model.layers.0."


@pytest.fixture
def settings(tmp_path):
    """A store of its own, of which some traces are held out, and int8 weights whose layers are measured."""
    made = entry(tmp_path / "own.jsonl")
    calibration = {**made["calibration"], "held_out_tokens": 300}
    return {
        "traces": made["traces"],
        "calibration": calibration,
        "quantization": {**INT8, "int8_activation_limit": 0.01},
    }


def written(folder: Path) -> tuple[dict, tuple[str, ...]]:
    """What the run record and config.json say."""
    record = json.loads((folder / "rac_run.json").read_text())
    return record["activations"], SparsityRecord.of(
        json.loads((folder / "config.json").read_text())
    ).int8_activations


def test_the_record_is_that_of_the_command_on_the_same_traces(prune, settings, tmp_path):
    prune(output_dir=tmp_path / "out", **settings)
    record, int8 = written(tmp_path / "out")
    assert {name for name, row in record["layers"].items() if row["bits"] == 8} == set(int8)
    assert len(record["layers"]) == 14
    assert len(int8) > 10
    assert (record["limit"], record["source"]) == (0.01, "held-out traces")

    hold_out = HoldOut(300)
    list(hold_out.others(TraceStore.read(tmp_path / "own.jsonl")))
    layers, _ = layers_of(tmp_path / "out")
    choice = choose_activations(
        load_model(tmp_path / "out"), layers, [*map(sequence_of, hold_out.held)], 0.01
    )
    again = choice.as_dict("held-out traces")
    assert again["tokens"] == record["tokens"]
    assert again["kl"] == pytest.approx(record["kl"], rel=0.05)
    for name, row in again["layers"].items():
        assert row["error"] == pytest.approx(record["layers"][name]["error"], rel=1e-3)
        assert row["bits"] == record["layers"][name]["bits"]


@pytest.mark.parametrize("quantization", [INT8, int4()], ids=["int8", "int4"])
def test_a_layer_that_loses_accuracy_keeps_16_bits(
    prune, settings, tmp_path, tiny_folder, quantization
):
    """A channel x1000 of which down_proj hardly makes use: what 8 bits lose of the others is all of the output."""
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    up, down = (model.get_submodule(f"{FIRST}mlp.{name}") for name in ("up_proj", "down_proj"))
    up.weight.data[5] *= 1000
    down.weight.data[:, 5] *= 1e-4
    shutil.copytree(tiny_folder, tmp_path / "outlier")
    model.save_pretrained(tmp_path / "outlier")
    settings["quantization"] = {**quantization, "int8_activation_limit": 0.01}
    prune(model=str(tmp_path / "outlier"), output_dir=tmp_path / "out", **settings)
    record, int8 = written(tmp_path / "out")
    assert record["layers"][f"{FIRST}mlp.down_proj"]["bits"] == 16
    assert f"{FIRST}mlp.down_proj" not in int8
    assert "model.layers.1.mlp.down_proj" in int8


def test_no_limit_measures_nothing(prune, settings, tmp_path):
    settings["quantization"] = INT8
    prune(output_dir=tmp_path / "out", **settings)
    assert "activations" not in json.loads((tmp_path / "out" / "rac_run.json").read_text())
    assert "int8_activations" not in (tmp_path / "out" / "config.json").read_text()


def test_activations_that_the_scheme_rounds_are_not_rounded_twice(prune, settings, tmp_path):
    """W8A8 rounds activations in the run's own forward passes; the kernels do not, and neither does the measurement."""
    settings["quantization"] = {"scheme": "W8A8", "int8_activation_limit": 1e6}
    model = prune(output_dir=tmp_path / "w8a8", **settings)
    assert all(module.quantization_enabled for module in linears(model).values())
    record, int8 = written(tmp_path / "w8a8")
    assert len(int8) == 14
    weights_only = {**INT8, "int8_activation_limit": 1e6}
    prune(output_dir=tmp_path / "w8", **{**settings, "quantization": weights_only})
    first = f"{FIRST}self_attn.q_proj"
    assert record["layers"][first]["error"] == pytest.approx(
        written(tmp_path / "w8")[0]["layers"][first]["error"], rel=1e-3
    )
    assert record["kl"] > 0


def test_a_failure_is_recorded_and_costs_no_model(prune, settings, tmp_path, monkeypatch):
    from rac_modifier.llmcompressor import activation_stage

    def fails(*args):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(activation_stage, "choose_activations", fails)
    prune(output_dir=tmp_path / "out", **settings)
    assert written(tmp_path / "out") == ({"not_measured": "out of memory"}, ())
    assert load_model(tmp_path / "out")


def test_routed_experts_keep_16_bits(prune, settings, tmp_path):
    folder = save_tiny_experts(tmp_path / "experts")
    prune(model=str(folder), output_dir=tmp_path / "out", **settings)
    record, int8 = written(tmp_path / "out")
    assert len(record["layers"]) == 8  # of attention
    assert int8
    layers, left_out = layers_of(tmp_path / "out")
    assert {layer.module for layer in layers} == record["layers"].keys()
    assert left_out.keys() == {"routed experts take 16 bits"}


def test_groups_that_are_multiplied_as_floats_are_refused_before_the_run(prune, settings, tmp_path):
    pairs = {"num_bits": 8, "strategy": "group", "group_size": 2}
    settings["quantization"] = {
        "config_groups": {"g": {"weights": pairs}},
        "int8_activation_limit": 0.01,
    }
    with pytest.raises(
        RacError,
        match=r"int8_activation_limit: 0\.01 has no effect here: no pruned module is int8 or int4 as",
    ):
        prune(output_dir=tmp_path / "out", **settings)


def test_a_checkpoint_that_cannot_record_it_is_refused_before_the_run(prune, settings, tmp_path):
    with pytest.raises(
        RacError,
        match=r"int8_activation_limit: 0\.01 has no effect beside oneshot's save_compressed=False",
    ):
        prune(output_dir=tmp_path / "out", oneshot_options={"save_compressed": False}, **settings)
