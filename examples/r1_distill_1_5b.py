"""DeepSeek-R1-Distill-Qwen-1.5B on one GPU: dense, 50 %, 2:4, 2:4 + int4, int4, and their page.

    RAC_VLLM=.venv-serve/bin/vllm python examples/r1_distill_1_5b.py
    python examples/r1_distill_1_5b.py --dry-run

1. The grid is checked: recipes, disk, the serving environment. --check stops here.
2. The model's own traces are sampled through `vllm serve`.
3. Each model is compressed, measured (KL, bytes) and served for its tokens per second.
4. OUT/report.html shows all of it.
5. Each model is asked MATH-500 and AIME 2024 as published: OUT/benchmarks/*.json.

The model, the prompts of OpenR1-Math-220k and the benchmarks come from the Hugging Face hub. Run
the same command again after a kill: what is finished is not done again. The grid is
beside this file; --grid FILE takes a changed copy. --dry-run takes all steps
with few small numbers on the embedded reasoner: on a CPU, without server and without download.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
import yaml

from rac_modifier import RacError
from rac_modifier.cli import app
from rac_modifier.problems.held_out import held_out_problems
from rac_modifier.settings.grid import load_grid, plan_rows

MODEL = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
GRID = Path(__file__).with_suffix(".yaml")
PRESETS = ("math-500", "aime24")
MOST_TRACES = (
    8  # answers per model on the page; answers of 4,096 tokens are long, and 1.5 MB the most
)


def rac(*words: object) -> None:
    """A command of `rac`, in this process; the script ends with it where it was interrupted."""
    print("$ rac", *words, flush=True)
    if code := app([str(word) for word in words], standalone_mode=False):
        sys.exit(code)


def small_grid(out: Path) -> Path:
    """Return the grid's rows with numbers for the reasoner."""
    content = yaml.safe_load(GRID.read_text())
    content["shared"] = {
        "traces": {"problems": {"source": "arithmetic"}, "sampling": {"max_new_tokens": 48}},
        "calibration": {"tokens": 1024, "held_out_tokens": 0},
    }
    content["evaluation"] = {"problems": 3, "cap": 24}
    (out / "grid.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return out / "grid.yaml"


def small_benchmark(out: Path) -> list[object]:
    """Return the options that ask two problems in the layout of the benchmarks."""
    rows = [
        {"problem": p.question, "answer": p.answer}
        for p in held_out_problems("arithmetic", 2, seed=1)
    ]
    questions = out / "questions.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--source", questions, "--problems", 2, "--samples", 2, "--cap", 16]


def ask_benchmarks(model: str, out: Path, options: list[object]) -> None:
    """Ask each model the benchmarks that it has no result of; a failure stops no other model."""
    (out / "benchmarks").mkdir(exist_ok=True)
    for preset in PRESETS:
        dense = out / "benchmarks" / f"{preset}-dense.json"
        for name in (model, *sorted((out / "models").iterdir())):
            result, paired = dense, []
            if name != model:
                result = out / "benchmarks" / f"{preset}-{name.name}.json"
                paired = ["--baseline", dense]
            if not result.exists():
                files = ["--answers", result.with_suffix(".jsonl"), "--json", result, *paired]
                try:
                    rac("eval", name, "--preset", preset, *files, *options)
                except RacError as error:
                    print(f"{name}: {preset} was not measured ({error})")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("r1-distill-1.5b"), help="folder of the results"
    )
    parser.add_argument("--grid", default=GRID, help="a changed copy of the shipped grid")
    parser.add_argument("--check", action="store_true", help="only check, and stop")
    parser.add_argument(
        "--dry-run", action="store_true", help="all steps on the embedded reasoner, in this process"
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.dry_run:
        model, grid, options, serve = (
            "reasoner",
            small_grid(args.out),
            ["--precision", "float32"],
            [],
        )
    elif torch.cuda.is_available():
        model, grid, options = MODEL, args.grid, []
        serve = ["--serve", "--concurrency", load_grid(grid).evaluation.concurrency or 64]
    else:
        raise RacError(
            "no GPU is found; run it on a machine that has one, or try --dry-run, which needs none"
        )
    frontier = ["frontier", model, "--recipe-grid", grid, "--out", args.out, *options]
    rac(*frontier, "--check")
    if args.check:
        return
    # all rows calibrate on the same traces
    recipe = args.out / "traces.yaml"
    recipe.write_text(
        yaml.safe_dump(plan_rows(load_grid(grid), str(grid))[0].recipe, sort_keys=False)
    )
    rac("traces", "collect", model, "--recipe", recipe, *serve)
    try:
        rac(*frontier)
    finally:
        if (args.out / "rows.jsonl").exists():
            rac("report", args.out, "-o", args.out / "report.html", "--traces", MOST_TRACES)
    small = small_benchmark(args.out) if args.dry_run else []
    ask_benchmarks(model, args.out, [*options, *serve, *small])


if __name__ == "__main__":
    try:
        main()
    except RacError as error:
        sys.exit(f"error: {error}")
