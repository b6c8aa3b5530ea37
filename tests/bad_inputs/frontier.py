"""Mistakes about `rac frontier` and `rac report`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from rac_modifier import recipe
from tests.bad_inputs.bench import Bench, Case, Cases
from tests.frontier.sample import write_sample
from tests.tiny import NAME

CASES = Cases()
GOOD = {"label": "good", "recipe": {NAME: {"sparsity": 0.5}}}
GPTQ = {"scheme": "W4A16", "ignore": ["lm_head"]}
BYTES = {"targets": ["Linear"], "weights": {"num_bits": 8, "strategy": "channel"}}


def frontier(b: Bench, *rows: dict[str, Any], **parts: Any) -> None:
    path = b.tmp / "grid.yaml"
    path.write_text(yaml.safe_dump({"rows": [GOOD, *rows], **parts}, sort_keys=False))
    b.rac("frontier", b.folder, "--recipe-grid", path, "--out", b.tmp / "out")


def written(b: Bench, text: str) -> Path:
    """A grid file with this text."""
    path = b.tmp / "text.yaml"
    path.write_text(text)
    return path


def collect(b: Bench, *options: str) -> None:
    b.rac("traces", "collect", b.folder, "-r", "rac_2of4", *options)


def changed(b: Bench, name: str, old: str, new: str) -> Path:
    """A folder of results with another text in one of its files."""
    path = write_sample(b.tmp / "sample") / name
    path.write_text(path.read_text().replace(old, new))
    return path.parent


CASES += [
    Case(
        "a recipe in the place of a grid",
        "is a recipe and no grid; write a grid with rows: [{label: one, recipe: ",
        lambda b: b.rac(
            "frontier", b.folder, "--recipe-grid", recipe("rac_2of4"), "--out", b.tmp / "out"
        ),
    ),
    Case(
        "a grid with a recipe that cannot be run",
        "Rows that could run: good",
        lambda b: frontier(b, {"label": "bad", "recipe": {NAME: {"sparsity": 1.5}}}),
    ),
    Case(
        "a grid with a pattern that does not fit the model",
        "- 3:6: model.layers.0.self_attn.q_proj",
        lambda b: frontier(b, {"label": "3:6", "recipe": {NAME: {"mask_structure": "3:6"}}}),
    ),
    Case(
        "a grid with groups that do not divide a layer",
        "has 64 inputs, no multiple of the group_size 128; set one that divides them",
        lambda b: frontier(
            b,
            {
                "label": "int4",
                "recipe": {"ReasoningAwareCalibrationModifier": {}, "GPTQModifier": GPTQ},
            },
        ),
    ),
    Case(
        "a grid with a modifier in front of the one that calibrates it",
        "which changes the model before its traces are taken; write it first",
        lambda b: frontier(
            b,
            {
                "label": "int4",
                "recipe": {"GPTQModifier": GPTQ, "ReasoningAwareCalibrationModifier": {}},
            },
        ),
    ),
    Case(
        "a grid with a modifier that calibrates, and nothing that says on what",
        "GPTQModifier calibrates, and nothing says on what; add ReasoningAwareCalibrationModifier: {} before it",
        lambda b: frontier(
            b,
            {
                "label": "int8",
                "recipe": {"GPTQModifier": {"config_groups": {"w": BYTES}, "ignore": ["lm_head"]}},
            },
        ),
    ),
    Case(
        "a grid with calibration seeds for a row that calibrates on nothing",
        "seeds: [0, 1] changes an entry of ours, and its recipe has none",
        lambda b: frontier(
            b, {"label": "nearest", "recipe": {"QuantizationModifier": GPTQ}, "seeds": [0, 1]}
        ),
    ),
    Case(
        "a grid with one label twice",
        "this label is used twice; give each row its own",
        lambda b: frontier(b, GOOD),
    ),
    Case(
        "a grid that is evaluated on the file that it is calibrated on",
        "whose problems are those of the evaluation; name another file or dataset",
        lambda b: frontier(
            b,
            shared={"traces": {"problems": {"source": "questions.jsonl"}}},
            evaluation={"source": "questions.jsonl"},
        ),
    ),
    Case(
        "a grid whose rows ask with different prompts",
        "set template, system_prompt and thinking under shared: traces: sampling",
        lambda b: frontier(
            b, {**GOOD, "label": "brief", "set": {"traces.sampling.system_prompt": "Be brief."}}
        ),
    ),
    Case(
        "a grid with a setting that does not exist",
        "evaluation.caps: there is no such setting",
        lambda b: frontier(b, evaluation={"caps": 3}),
    ),
    Case(
        "`rac frontier` with a grid that is not there",
        "name a YAML file, or one of contenders, paper, quantization, r1_distill_1_5b, served, small",
        lambda b: b.rac("frontier", b.folder, "--recipe-grid", "none.yaml", "--out", b.tmp / "out"),
    ),
    Case(
        "a grid with a benchmark that does not exist",
        "no preset 'math'; use one of aime24, aime25, gpqa-diamond, gsm8k",
        lambda b: frontier(b, evaluation={"benchmarks": [{"preset": "math"}]}),
    ),
    Case(
        "a grid with a benchmark twice",
        "benchmarks names math-500 twice; name each once",
        lambda b: frontier(
            b, evaluation={"benchmarks": [{"preset": "math-500"}, {"preset": "math-500", "cap": 9}]}
        ),
    ),
    Case(
        "a grid that is a text",
        "holds no grid but str; write it as rows:",
        lambda b: b.rac(
            "frontier", b.folder, "--recipe-grid", written(b, "hello"), "--out", b.tmp / "f"
        ),
    ),
    Case(
        "a grid with a concurrency and no server",
        "concurrency=9 is for a server; set serve: true, or set batch_size",
        lambda b: frontier(b, evaluation={"concurrency": 9}),
    ),
    Case(
        "a grid that does not fit the memory or the disk",
        "nothing was started, because this does not fit:",
        lambda b: frontier(b, shared={"calibration": {"tokens": 10**9}}),
    ),
    Case(
        "a grid whose models are served, without a vllm",
        "is no command that can be run; name the vllm of the environment that has it",
        lambda b: (
            b.monkeypatch.setenv("RAC_VLLM", "/no/vllm"),
            frontier(b, evaluation={"serve": True}),
        ),
    ),
    Case(
        "`rac traces collect --serve` with a recipe that names servers",
        "--serve starts a server, and the recipe names http://127.0.0.1:9/v1; leave one out",
        lambda b: collect(
            b, "-s", 'traces.engine={"base_urls": ["http://127.0.0.1:9"]}', "--serve"
        ),
    ),
    Case(
        "`rac traces collect --concurrency` without a server",
        "--concurrency 9 is for --serve",
        lambda b: collect(b, "--concurrency", "9"),
    ),
    Case(
        "`rac frontier` into a folder of another model",
        "was measured with another model",
        lambda b: b.rac(
            "frontier", b.folder, "--recipe-grid", "small", "--out", write_sample(b.tmp / "sample")
        ),
    ),
    Case(
        "`rac report` of results of another version",
        "is of version 2, and this package reads and writes version 1",
        lambda b: b.rac(
            "report", changed(b, "rows.jsonl", '"version": 1', '"version": 2'), "-o", "report.html"
        ),
    ),
    Case(
        "`rac report` of a damaged line",
        "line 1: not JSON",
        lambda b: b.rac(
            "report", changed(b, "rows.jsonl", '{"version"', '"version"'), "-o", "report.html"
        ),
    ),
    Case(
        "`rac report` of a folder without results",
        "holds no results of rac frontier",
        lambda b: b.rac("report", b.tmp, "-o", "report.html"),
    ),
    Case(
        "`rac report` into another kind of file",
        "use a name that ends in .html",
        lambda b: b.rac("report", write_sample(b.tmp / "sample"), "-o", "report.pdf"),
    ),
]
