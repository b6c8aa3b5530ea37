"""Runs of the tiny model: how tests start them, a pruned one that they share, and one that dies."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from compressed_tensors.offload.cache import CPUCache
from compressed_tensors.offload.utils import send_tensors
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM

from rac_modifier import ReasoningAwareCalibrationModifier, ReasoningAwareSparseGPTModifier
from rac_modifier.llmcompressor import solving
from tests.tiny import calibration_entry, entry

BUILD = "rac_modifier.llmcompressor.calibration_modifier.build_calibration_set"


class Killed(BaseException):
    """Ends a run as a kill does: nothing more is pruned or written."""


def _oneshot(folder, recipe, model, pipeline, output_dir, oneshot_options):
    return oneshot(
        model=str(folder) if model is None else model,
        recipe=recipe,
        pipeline=pipeline,
        output_dir=None if output_dir is None else str(output_dir),
        **(oneshot_options or {}),
    )


@pytest.fixture(scope="session")
def prune(tiny_folder, trace_store):
    """Prune the tiny model with a recipe of ours, changed by `settings`."""

    def prune(
        model=None,
        earlier=(),
        later=(),
        pipeline="independent",
        output_dir=None,
        oneshot_options=None,
        **settings,
    ):
        ours = ReasoningAwareSparseGPTModifier(**entry(trace_store, **settings))
        recipe = [*earlier, ours, *later]
        return _oneshot(tiny_folder, recipe, model, pipeline, output_dir, oneshot_options)

    return prune


@pytest.fixture(scope="session")
def calibrate(tiny_folder, trace_store):
    """Run other modifiers on the tiny model, calibrated on its traces."""

    def calibrate(
        later=(), pipeline="independent", output_dir=None, oneshot_options=None, **settings
    ):
        ours = ReasoningAwareCalibrationModifier(**calibration_entry(trace_store, **settings))
        recipe = [ours, *later]
        return _oneshot(tiny_folder, recipe, None, pipeline, output_dir, oneshot_options)

    return calibrate


@pytest.fixture
def dense(tiny_folder):
    return AutoModelForCausalLM.from_pretrained(tiny_folder)


@pytest.fixture(scope="session")
def pruned(prune, tmp_path_factory):
    """The default run: its folder, its model (not to be changed) and its record."""
    folder = tmp_path_factory.mktemp("pruned") / "out"
    model = prune(output_dir=folder)
    return SimpleNamespace(folder=folder, model=model, record=record_of(folder))


def record_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "rac_run.json").read_text())


def quantization_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def fp8() -> QuantizationModifier:
    return QuantizationModifier(targets=["Linear"], ignore=["lm_head"], scheme="FP8_DYNAMIC")


def int8_head() -> QuantizationModifier:
    weights = {"num_bits": 8, "strategy": "channel"}
    return QuantizationModifier(
        ignore=[], config_groups={"h": {"targets": ["lm_head"], "weights": weights}}
    )


@pytest.fixture
def copies(monkeypatch):
    """As on a GPU, each read of an offloaded weight gives a copy of its own, without a gradient."""

    def onload(cache, offloaded):
        return send_tensors(offloaded, device=cache.onload_device, copy=True)

    monkeypatch.setattr(CPUCache, "onload", onload)


@pytest.fixture
def off_policy(trace_store):
    """Trace settings that take the float32 model's traces for a model made of it."""
    return {**entry(trace_store)["traces"], "allow_off_policy": True}


@pytest.fixture
def nothing_is_sampled(monkeypatch):
    monkeypatch.setattr(BUILD, None)


@pytest.fixture
def solved(monkeypatch):
    """The names of each group that is solved; after `solved.lives` of them a run dies."""

    class Solved(list):
        lives = 10**6

    groups, solve = Solved(), solving.solve_many

    def counted(problems: Any, options: Any) -> Any:
        if problems[0].names[0].startswith("rehearsal"):  # of the memory check
            return solve(problems, options)
        if groups.lives == 0:
            raise Killed
        groups.lives -= 1
        groups.extend(problem.names for problem in problems)
        return solve(problems, options)

    monkeypatch.setattr(solving, "solve_many", counted)
    return groups
