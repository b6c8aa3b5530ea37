"""Every setting changes what is computed, or is refused where it cannot. A new setting needs a row in every_setting.py."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from llmcompressor import oneshot
from transformers import AutoModelForCausalLM, AutoTokenizer

from rac_modifier import ReasoningAwareSparseGPTModifier
from rac_modifier.calibration import trace_pool
from rac_modifier.calibration.calibration_set import build_calibration_set
from rac_modifier.errors import RacError
from rac_modifier.settings.entries import ENTRIES, PruningEntry
from rac_modifier.settings.recipe import check_entry
from tests.settings.every_setting import (
    BASE,
    CALIBRATED,
    PRUNED,
    RECOVERED,
    SERVED,
    Row,
    group_once,
    leaves,
    merged,
    nested,
)
from tests.tiny import save_tiny, save_tiny_experts

Outcome = Any  # what can be compared: lists and mappings of numbers and text


def name(row: Row) -> str:
    return f"{row.path}={row.value} with {json.dumps(row.base)}"


def test_every_setting_has_a_row():
    rows = {group_once(row.path) for row in (*PRUNED, *CALIBRATED, *RECOVERED)}
    settings = {group_once(path) for entry in ENTRIES.values() for path in leaves(entry)}
    assert settings == rows | SERVED


@pytest.mark.parametrize("row", [*PRUNED, *CALIBRATED, *RECOVERED], ids=name)
def test_the_rows_are_accepted(row):
    check_entry(started(row.base), "recipe.yaml")
    check_entry(entry_of(row), "recipe.yaml")


def started(base: dict[str, Any]) -> dict[str, Any]:
    """BASE with `base` over it, without the settings of BASE that its mixture does not use."""
    line = str(base.get("calibration", {}).get("mixture", "traces@1"))
    plain = BASE if "traces@" in line else merged(BASE, {"traces": {"sampling": None}})
    if "traces" not in line:
        plain = merged(plain, {"calibration": {"held_out_tokens": None}})
    return merged(plain, base)


def entry_of(row: Row) -> dict[str, Any]:
    return merged(started(row.base), nested(row.path, row.value))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of a small model, of one with other weights, and of one with experts."""
    folder = tmp_path_factory.mktemp("models")
    save_tiny(folder / "own", num_hidden_layers=1)
    save_tiny(folder / "other", num_hidden_layers=1, seed=1)
    save_tiny_experts(folder / "experts", num_hidden_layers=1)
    return folder


@pytest.fixture
def place(models, tmp_path, monkeypatch):
    """The current folder, with the files that the rows name; data sets come from memory."""
    monkeypatch.chdir(tmp_path)
    rows = [
        {"problem": f"{i} what is {'1 + ' * (i % 5)}1?", "other": f"say {i}", "answer": str(i)}
        for i in range(60)
    ]
    Path("problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [
        {"text": f"{i} " + "some text. " * 20, "other": f"{i} " + "different. " * 20}
        for i in range(20)
    ]
    Path("text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    Path("text.txt").write_text("ordinary text. " * 200)

    def load_dataset(path, config=None, split="train", data_files=None, **options):
        if path in ("json", "parquet"):
            return inner(path, data_files=data_files, split=split, **options)
        made = [
            {"problem": f"{config} {split} {i}?", "text": f"{config} {split} {i} " + "word " * 60}
            for i in range(60)
        ]
        return datasets.Dataset.from_list(made)

    # a selection that keeps too little is refused after four traces, not after some hundred
    enough = next(name for name in vars(trace_pool) if name.startswith("_ENOUGH_TO_"))
    monkeypatch.setattr(trace_pool, enough, 4)
    inner = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return tmp_path


def loaded(models: Path, kind: str = "own") -> Any:
    return AutoModelForCausalLM.from_pretrained(models / kind)


def pruned(models: Path, settings: dict[str, Any], save_to: Path, kind: str) -> Outcome:
    """The weights that a run leaves, its order, and the sizes of its files; or its error."""
    model = loaded(models, kind)
    try:
        modifier = ReasoningAwareSparseGPTModifier(**settings)
        oneshot(model=model, recipe=modifier, output_dir=str(save_to))
    except RacError as error:
        return str(error)
    weights = {
        key: hashlib.sha256(value.float().numpy().tobytes()).hexdigest()
        for key, value in model.state_dict().items()
    }
    files = {path.name: path.stat().st_size for path in save_to.glob("*.safetensors")}
    return weights, files, json.loads((save_to / "rac_run.json").read_text())["order"]


def calibrated(models: Path, settings: dict[str, Any]) -> Outcome:
    """Batches and token weights, traces, how the model was called, and files; or the error."""
    shutil.rmtree("rac_traces", ignore_errors=True)
    Path("other.jsonl").unlink(missing_ok=True)
    model, shapes = loaded(models), []
    model.get_input_embeddings().register_forward_pre_hook(
        lambda module, args: shapes.append(list(args[0].shape))
    )
    tokenizer = AutoTokenizer.from_pretrained(models / "own")
    entry = PruningEntry(**settings)
    torch.manual_seed(0)
    try:
        made = build_calibration_set(
            model, tokenizer, entry.traces, entry.calibration, progress=False
        )
    except RacError as error:
        return str(error)
    weights = made.loader.token_weights
    mean = torch.cat([row[row > 0] for row in weights]).mean()  # a common factor cancels out
    return {
        "batches": [batch["input_ids"].tolist() for batch in made.loader],
        "weights": [(row / mean).tolist() for row in weights],
        "stored": [
            [[t.id, t.prompt_ids, t.completion_ids, t.answer] for t in pool.store]
            for pool in made.pools.values()
        ],
        "held_out": [trace.id for trace in made.held_out],
        "calls": shapes,
        "files": sorted(path.name for path in Path().glob("*.jsonl")),
    }


@pytest.fixture(scope="module")
def known() -> dict[str, Outcome]:
    """What each base gave: many rows share one."""
    return {}


def both(row: Row, known: dict[str, Outcome], observe: Any, what: str) -> tuple[Outcome, Outcome]:
    """What `observe` gives for the base of a row, and for the row."""
    base = started(row.base)
    key = json.dumps([what, base], sort_keys=True)
    if key not in known:
        known[key] = observe(copy.deepcopy(base))
    return known[key], observe(copy.deepcopy(entry_of(row)))


@pytest.mark.slow
@pytest.mark.parametrize("row", PRUNED, ids=name)
def test_a_setting_of_pruning_changes_the_result(row, models, known, place):
    kind = "experts" if row.path in ("experts", "expert_floor") else "own"
    folders = iter((place / "before", place / "after"))
    before, after = both(row, known, lambda s: pruned(models, s, next(folders), kind), kind)
    assert not isinstance(before, str), before
    assert before != after


@pytest.mark.slow
@pytest.mark.parametrize("row", CALIBRATED, ids=name)
def test_a_setting_of_calibration_changes_the_calibration_set(row, models, known, place):
    foreign = row.path.endswith("allow_off_policy")
    if foreign:  # a store of the other model's traces
        entry = PruningEntry(**merged(BASE, row.base))
        tokenizer = AutoTokenizer.from_pretrained(models / "own")
        model = loaded(models, "other")
        build_calibration_set(model, tokenizer, entry.traces, entry.calibration, progress=False)
    before, after = both(row, known, lambda settings: calibrated(models, settings), "calibrated")
    assert isinstance(before, str) is foreign, before
    assert before != after
