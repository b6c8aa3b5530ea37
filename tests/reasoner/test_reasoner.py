"""What the embedded reasoner promises: it solves held-out problems, and only by thinking."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import rac_modifier.reasoner
from rac_modifier.errors import RacError
from rac_modifier.evaluation import accuracy
from rac_modifier.evaluation.results import EvalResult, Row
from rac_modifier.problems.held_out import held_out_problems
from rac_modifier.reasoner import reasoner_path
from rac_modifier.sampling.generate import render_question
from rac_modifier.settings.problems import ProblemSource
from rac_modifier.settings.sampling import SamplingSettings
from rac_modifier.traces import fill_store
from tests import forked
from tests.reasoner import training_run
from tests.reasoner.training_run import TRAINING

ROOT = Path(__file__).parents[2]
PROBLEMS = 240


@pytest.fixture(scope="module")
def reasoner():
    path = reasoner_path()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(path)


def evaluated(reasoner, count, cap, path):
    """Greedy answers to held-out problems."""
    return accuracy.evaluate(
        *reasoner,
        held_out_problems("arithmetic", count),
        label="dense",
        source=ProblemSource(source="arithmetic"),
        sampling=SamplingSettings(temperature=0, max_new_tokens=cap, batch_size=128),
        path=path,
    )


@pytest.fixture(scope="module")
def answered(reasoner, tmp_path_factory):
    """Greedy answers to held-out problems: the result and its rows."""
    rows: list[Row] = []
    of = EvalResult.of

    def summarised(given, **options):
        rows.extend(given)
        return of(given, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EvalResult, "of", summarised)
        path = tmp_path_factory.mktemp("answers") / "a.jsonl"
        result = evaluated(reasoner, PROBLEMS, 512, path)
    return result, rows


@pytest.mark.slow
def test_it_solves_held_out_problems_of_every_task(answered):
    result, _ = answered
    assert result.accuracy >= 0.97
    assert len(result.per_task) == 4
    assert min(result.per_task.values()) >= 0.8  # 46 problems: two standard errors below 0.9
    assert result.unfinished_share <= 0.02


@pytest.mark.slow
def test_its_completions_are_long_next_to_its_prompts(reasoner, answered):
    _, rows = answered
    questions = (problem.question for problem in held_out_problems("arithmetic", PROBLEMS))
    prompts = (render_question(reasoner[1], question) for question in questions)
    tokens = sum(r.ending.tokens for r in rows)
    assert tokens >= 5 * sum(map(len, prompts))
    assert sum(r.ending.thinking_tokens for r in rows) >= 0.8 * tokens


@pytest.mark.slow
def test_it_fails_without_thinking(reasoner, tmp_path, monkeypatch):
    def closed(tokenizer, question, sampling):
        prompt = tokenizer.decode(render_question(tokenizer, question))
        return tokenizer.encode(f"{prompt}</think>\n", add_special_tokens=False)

    monkeypatch.setattr(fill_store, "render_question", closed)
    assert evaluated(reasoner, 80, 64, tmp_path / "a.jsonl").accuracy < 0.2


def test_a_trace_renders_token_for_token_as_in_training(reasoner):
    _, tokenizer = reasoner
    ids = render_question(tokenizer, "What is 12 + 34?")
    assert tokenizer.decode(ids) == "<|User|>What is 12 + 34?<|Assistant|><think>\n"
    for tag in ("<think>", "</think>"):
        ids = tokenizer.encode(tag, add_special_tokens=False)
        assert len(ids) == 1
        assert tokenizer.decode(ids, skip_special_tokens=True) == tag


def test_its_files_are_small_readable_and_safe():
    files = [f for f in reasoner_path().rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 12 * 2**20
    assert all(f.stat().st_mode & 0o044 == 0o044 for f in files)
    assert not [f.name for f in files if f.suffix in {".bin", ".pt", ".pkl", ".pth", ".py"}]
    weights = load_file(reasoner_path() / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    matrices = [tensor for tensor in weights.values() if tensor.dim() == 2]
    assert not any(size % 64 for tensor in matrices for size in tensor.shape)  # fits every format
    card = (reasoner_path() / "README.md").read_text()
    assert "license:" in card
    assert "training/train_reasoner.py" in card


def test_missing_assets_are_an_error_with_the_command_that_makes_them(monkeypatch, tmp_path):
    monkeypatch.setattr(rac_modifier.reasoner.resources, "files", lambda name: tmp_path)
    with pytest.raises(RacError, match=r"missing from .*train_reasoner.py --out"):
        reasoner_path()
    assets = tmp_path / "assets"
    assets.mkdir()
    (assets / "config.json").touch()
    with pytest.raises(RacError, match="missing"):
        reasoner_path()
    (assets / "model.safetensors").touch()
    assert reasoner_path() == assets


SETTINGS = ["--steps", "4", "--tokens", "1024", "--threads", "1", "--no-compile"]


def train(folder, *options):
    folder.mkdir(exist_ok=True)
    words = ["--out", str(folder / "out"), "--work", str(folder / "work"), *SETTINGS, *options]
    process = forked.run(training_run.main, words, folder)
    assert process.returncode == 0, process.stderr


@pytest.mark.slow
def test_training_is_deterministic_and_resumes_bit_by_bit(tmp_path):
    """As a command that runs to the end, and in two parts."""
    folders = ["--out", str(tmp_path / "a/out"), "--work", str(tmp_path / "a/work")]
    command = [sys.executable, str(TRAINING), *folders, *SETTINGS]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, check=True, cwd=ROOT, env=environment)
    train(tmp_path / "b", "--stop-after", "2")
    assert not (tmp_path / "b" / "out").exists()
    train(tmp_path / "b")
    for file in ("out/model.safetensors", "work/state.safetensors"):
        expected, actual = (load_file(tmp_path / run / file) for run in "ab")
        assert expected.keys() == actual.keys()
        assert not [name for name in expected if not torch.equal(expected[name], actual[name])]
