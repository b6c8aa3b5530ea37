"""The tiny model, dense and pruned."""

import json
from typing import Any

import pytest
from llmcompressor import oneshot
from transformers import AutoModelForCausalLM

from rac_modifier import ReasoningAwareCalibrationModifier, ReasoningAwareSparseGPTModifier
from rac_modifier.llmcompressor import resume, solving
from tests.llmcompressor.unfinished_runs import Killed
from tests.tiny import calibration_entry, entry


@pytest.fixture
def dense(tiny_folder):
    return AutoModelForCausalLM.from_pretrained(tiny_folder)


@pytest.fixture
def prune(tiny_folder, trace_store):
    """Run oneshot on the tiny model with a recipe of ours, changed by `settings`."""

    def prune(
        model=None,
        later=(),
        pipeline="independent",
        output_dir=None,
        oneshot_options=None,
        **settings,
    ):
        modifiers = [ReasoningAwareSparseGPTModifier(**entry(trace_store, **settings)), *later]
        return oneshot(
            model=str(tiny_folder) if model is None else model,
            recipe=modifiers,
            pipeline=pipeline,
            output_dir=None if output_dir is None else str(output_dir),
            **(oneshot_options or {}),
        )

    return prune


@pytest.fixture
def calibrate(tiny_folder, trace_store):
    """Run oneshot on the tiny model with other modifiers, calibrated on its traces."""

    def calibrate(
        later=(), pipeline="independent", output_dir=None, oneshot_options=None, **settings
    ):
        shared = calibration_entry(trace_store, **settings)
        return oneshot(
            model=str(tiny_folder),
            recipe=[ReasoningAwareCalibrationModifier(**shared), *later],
            pipeline=pipeline,
            output_dir=None if output_dir is None else str(output_dir),
            **(oneshot_options or {}),
        )

    return calibrate


@pytest.fixture
def record_of(tmp_path):
    """Run `prune` or `calibrate` into a folder and return its run record."""

    def record_of(run, **settings):
        folder = tmp_path / "recorded"
        run(output_dir=folder, **settings)
        return json.loads((folder / "rac_run.json").read_text())

    return record_of


@pytest.fixture
def off_policy(trace_store):
    """Trace settings that take the float32 model's traces for a model made of it."""
    return {**entry(trace_store)["traces"], "allow_off_policy": True}


@pytest.fixture
def at_once(monkeypatch):
    """Each group is written as soon as it is pruned."""
    monkeypatch.setattr(resume, "_SAVE_SECONDS", 0.0)


@pytest.fixture
def solved(monkeypatch):
    """The names of each group that is solved; after `solved.lives` of them a run dies."""

    class Solved(list):
        lives = 10**6

    groups, solve = Solved(), solving.solve_many

    def counted(method: Any, problems: Any, **kwargs: Any) -> Any:
        if problems[0].names[0].startswith("rehearsal"):  # of the memory check
            return solve(method, problems, **kwargs)
        if groups.lives == 0:
            raise Killed
        groups.lives -= 1
        groups.extend(problem.names for problem in problems)
        return solve(method, problems, **kwargs)

    monkeypatch.setattr(solving, "solve_many", counted)
    return groups
