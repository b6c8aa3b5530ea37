"""lm-eval on a packed checkpoint: it measures what stock transformers gives on the same weights."""

import functools
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from rac_modifier.__main__ import main
from rac_modifier.checkpoint.pack_plan import plan_packing
from rac_modifier.checkpoint.packing import pack_model
from tests.tiny import linears, tiny_model, tiny_tokenizer

# Made of local files alone. `choice` compares log-likelihoods, `text` generates.
COMMON = """
dataset_path: json
dataset_kwargs: {data_files: {test: PROBLEMS}}
test_split: test
doc_to_text: "{{question}}"
"""
CHOICE = """
task: rac_choice
output_type: multiple_choice
doc_to_choice: ["0", "1", "2", "3"]
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
TEXT = """
task: rac_text
output_type: generate_until
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["z"], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """A tiny 2:4 model, stored dense and packed."""
    folder = tmp_path_factory.mktemp("models")
    model = tiny_model()
    for linear in linears(model).values():
        linear.weight.data.view(-1, 4)[:, 1:3] = 0
    model.save_pretrained(folder / "dense")
    tiny_tokenizer().save_pretrained(folder / "dense")
    pack_model(plan_packing(folder / "dense"), folder / "packed", "dense")
    return {name: folder / name for name in ("dense", "packed")}


@pytest.fixture
def tasks(tmp_path) -> Path:
    problems = tmp_path / "problems.jsonl"
    rows = [{"question": f"{a}+{b}=", "answer": a + b} for a in range(2) for b in range(3)]
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in (("choice", CHOICE), ("text", TEXT)):
        (tmp_path / f"{name}.yaml").write_text(text + COMMON.replace("PROBLEMS", str(problems)))
    return tmp_path


def words(model: Path, tasks: Path, out: Path) -> list[str]:
    return [
        "run", "--model", "hf", "--model_args", f"pretrained={model},dtype=float32", "--device",
        "cpu",
        "--include_path", str(tasks), "--tasks", "rac_choice,rac_text", "--batch_size", "4",
        "--output_path", str(out), "--log_samples",
    ]  # fmt: skip


def answers(out: Path) -> dict[str, list[Any]]:
    """Of each task: what the model gave for each problem, in order."""
    responses = {}
    for path in out.rglob("samples_*.jsonl"):
        rows = sorted(map(json.loads, path.read_text().splitlines()), key=lambda row: row["doc_id"])
        responses[path.name.split("_2")[0]] = [row["resps"] for row in rows]
    return responses


def test_it_measures_the_weights_that_are_stored(models, tasks, tmp_path, monkeypatch):
    from lm_eval.tasks import TaskManager

    # without the index of lm-eval's own 14,000 tasks, which takes 5 s
    index = functools.partialmethod(TaskManager.__init__, include_defaults=False)
    monkeypatch.setattr(TaskManager, "__init__", index)
    for name, model in models.items():
        command = ["rac_modifier", "lm_eval", *words(model, tasks, tmp_path / name)]
        monkeypatch.setattr(sys, "argv", command)
        main()
    dense, packed = answers(tmp_path / "dense"), answers(tmp_path / "packed")
    assert dense.keys() == {"samples_rac_choice", "samples_rac_text"}
    assert [len(rows) for rows in dense.values()] == [6, 6]
    assert packed == dense
    assert len({str(row) for row in dense["samples_rac_choice"]}) == 6


def test_without_the_harness_it_says_what_installs_it(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["rac_modifier", "no_harness", "run"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert "no_harness is not installed; name lm_eval (pip install" in str(ended.value.code)
