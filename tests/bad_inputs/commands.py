"""Mistakes in the words of a command: `rac eval`, `rac frontier` and `rac report`."""

import json
from functools import partial
from pathlib import Path

from tests.bad_inputs.bench import Bench, Case, Cases
from tests.frontier.sample import write_sample

CASES = Cases()
URL = "http://127.0.0.1:1"
WORDS = {
    "`rac eval` of nothing": ("eval", "no model is named; give a model folder"),
    "`rac eval` of a model twice": ("eval a a", "twice and would be compared with itself"),
    "`rac eval --divergence` of one": ("eval a --divergence", "name at least two"),
    "`rac eval --divergence` by a server": (
        f"eval a b --divergence --server {URL}",
        "leave --server and --serve out",
    ),
    "`rac eval --divergence --baseline`": (
        "eval a b --divergence --baseline r.json",
        "leave --baseline out",
    ),
    "`rac eval --serve --server`": (f"eval a --serve --server {URL}", "leave one of them out"),
    "`rac eval --server` of two models": (
        f"eval a b --server {URL}",
        "evaluate each alone, the dense one with --json FILE",
    ),
    "`rac eval --server --precision`": (
        f"eval a --server {URL} --precision auto",
        "--precision is for a model that is loaded here",
    ),
    "`rac eval --served-as` without a server": ("eval a --served-as m", "add --server URL"),
    "`rac eval` of two servers with one name": (
        f"eval --server {URL} --server http://a --served-as m",
        "--served-as names 1 models for 2 servers; give one each",
    ),
    "`rac eval --card` without a folder": (
        f"eval --server {URL} --card",
        "--card and --template need a model folder",
    ),
    "`rac eval --stopping --card`": ("eval a --stopping --card", "leave --divergence and --card"),
    "`rac eval --card` of the embedded model": (
        "eval reasoner --card --problems 1",
        "is not the folder of a model that rac wrote",
    ),
    "`rac eval --preset` of generated problems": (
        "eval reasoner --preset gsm8k --source reasoning-gym:gcd",
        "source 'reasoning-gym:gcd' generates its problems",
    ),
    "`rac eval --samples 4`, greedy": (
        "eval reasoner --samples 4 --problems 1",
        "4 samples per problem at temperature 0",
    ),
    "`rac report` without a page's name": ("report f -o r.txt", "use a name that ends in .html"),
    "`rac report` into no folder": ("report f -o no/r.html", "no/r.html: cannot be written"),
    "`rac report` of an empty folder": ("report e -o r.html", "e holds no results; make them"),
}


def run(b: Bench, line: str) -> None:
    write_sample(b.tmp / "f")
    b.rac(*line.split())


CASES += [Case(did, says, partial(run, line=line)) for did, (line, says) in WORDS.items()]


@CASES.case("WORLD_SIZE that is no number", "WORLD_SIZE is 'abc', and no number; unset it")
def _(b: Bench) -> None:
    b.monkeypatch.setenv("WORLD_SIZE", "abc")
    b.rac("inspect", "x")


def damaged(b: Bench, name: str, old: str, new: str) -> None:
    path: Path = write_sample(b.tmp / "f") / name
    path.write_text(path.read_text().replace(old, new, 1))
    b.rac("report", b.tmp / "f", "-o", "r.html")


@CASES.case("a row of a frontier that was changed by hand", "rows.jsonl, line 1: no row of rac")
def _(b: Bench) -> None:
    damaged(b, "rows.jsonl", '"total": 8000000', '"total": "x"')


@CASES.case("a frontier.json without its evaluation", "frontier.json: damaged")
def _(b: Bench) -> None:
    damaged(b, "frontier.json", '"evaluation"', '"evaluated"')


@CASES.case("a run record whose prompts are damaged", "rac_run.json: unreadable prompt settings")
def _(b: Bench) -> None:
    from rac_modifier.evaluation.calibrated_prompt import recorded_prompts

    (b.tmp / "rac_run.json").write_text(json.dumps({"prompts": {"traces": {"a": 1}}}))
    recorded_prompts(str(b.tmp))


@CASES.case("a frontier that is served, of problems without answers", "name their column (answer")
def _(b: Bench) -> None:
    (b.tmp / "q.jsonl").write_text('{"question": "why?"}\n')
    grid = "evaluation: {source: q.jsonl, problems: 1, serve: true}\n"
    (b.tmp / "grid.yaml").write_text(f"{grid}rows: [{{label: a, recipe: rac_2of4}}]")
    b.monkeypatch.setenv("RAC_VLLM", "sh")
    check = "rac_modifier.sampling.own_server.VllmCommand.check_plugin"
    b.monkeypatch.setattr(check, lambda self: None)
    b.rac("frontier", b.folder, "--recipe-grid", "grid.yaml", "--out", "o")
