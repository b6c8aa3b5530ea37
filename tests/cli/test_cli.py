import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rac_modifier import cli
from rac_modifier.traces.store import TraceStore
from tests.tiny import entry, recipe

COMMANDS = [(), ("traces",), ("traces", "collect"), ("traces", "inspect"), ("traces", "export"), ("prune",), ("eval",),
            ("inspect",), ("schema",), ("estimate",)]  # fmt: skip


@pytest.fixture
def rac(monkeypatch, capsys):
    """Run the command as the shell does: exit code, standard output, standard error."""

    def rac(*args):
        monkeypatch.setattr(sys, "argv", ["rac", *map(str, args)])
        code = 0
        try:
            cli.main()
        except SystemExit as exit_:
            code = exit_.code or 0
        output = capsys.readouterr()
        return code, output.out, output.err

    return rac


@pytest.fixture
def recipe_file(trace_store, tmp_path):
    (tmp_path / "recipe.yaml").write_text(recipe(entry(trace_store)))
    return tmp_path / "recipe.yaml"


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help(command):
    result = CliRunner().invoke(cli.app, [*command, "--help"], terminal_width=120)
    assert result.exit_code == 0
    assert "Usage:" in result.output


def test_every_option_and_argument_explains_itself():
    import typer

    def walk(command):
        for parameter in command.params:
            if parameter.name != "help":
                yield command.name, parameter
        for child in getattr(command, "commands", {}).values():
            yield from walk(child)

    parameters = list(walk(typer.main.get_command(cli.app)))
    assert len(parameters) > 15
    assert [(command, p.name) for command, p in parameters if not getattr(p, "help", None)] == []


def test_prune_inspect_and_eval(rac, tiny_folder, recipe_file, tmp_path):
    out = tmp_path / "sparse"
    code, stdout, _ = rac("prune", tiny_folder, out, "-r", recipe_file, "-s", "calibration.tokens=500")
    assert code == 0
    assert f"rac inspect {out}" in stdout
    record = json.loads((out / "rac_run.json").read_text())
    assert record["calibration"]["tokens"] == 500

    code, stdout, _ = rac("inspect", out)
    assert code == 0
    assert "model.layers.1.mlp.down_proj" in stdout
    assert "2:4" in stdout

    results = tmp_path / "eval.json"
    code, stdout, _ = rac("eval", tiny_folder, out, "--problems", 4, "--cap", 8, "--json", results)
    assert code == 0
    assert re.search(rf"{re.escape(str(out))}\s.*%", stdout)
    rows = json.loads(results.read_text())["results"]
    assert [row["label"] for row in rows] == [str(tiny_folder), str(out)]
    assert {row["problems"] for row in rows} == {4}


def test_eval_divergence(rac, tiny_folder, tmp_path):
    plot, results = tmp_path / "d.png", tmp_path / "d.json"
    options = ("--divergence", "--problems", 4, "--cap", 12)
    code, stdout, _ = rac("eval", tiny_folder, tiny_folder, *options, "--plot", plot, "--json", results)
    assert code == 0
    assert "KL" in stdout
    (found,) = json.loads(results.read_text())["divergence"]
    assert found["kl"] == pytest.approx(0.0, abs=1e-5)  # of a model with itself
    assert found["agreement"] == 1.0
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_eval_divergence_needs_two_models(rac, tiny_folder, tmp_path):
    assert "name at least two models" in rac("eval", tiny_folder, "--divergence")[2]
    assert "without --direct" in rac("eval", tiny_folder, tiny_folder, "--divergence", "--direct")[2]
    assert "give --divergence too" in rac("eval", tiny_folder, "--plot", tmp_path / "x.png")[2]


def test_traces_collect_and_inspect(rac, tiny_folder, recipe_file, tmp_path):
    store = tmp_path / "new.jsonl"
    options = ("-r", recipe_file, "-s", f"traces.store={store}", "-s", "calibration.tokens=300")
    code, stdout, _ = rac("traces", "collect", tiny_folder, *options)
    assert code == 0
    held = TraceStore.read(store)
    assert held.counts.tokens >= 300
    assert f"{len(held)} traces, {held.counts.tokens} tokens" in stdout

    code, stdout, _ = rac("traces", "inspect", store, "--samples", 0, "--verify", "--select", "{finished: true}")
    assert code == 0
    assert f"verified    0 of {len(held)} right" in stdout
    assert f"selection   kept {held.counts.finished} of {len(held)}" in stdout

    out = tmp_path / "new.parquet"
    assert f"{out}: {len(held)} traces" in rac("traces", "export", store, out, "--text")[1]

    code, stdout, _ = rac("traces", "inspect", store, "--samples", 2)
    assert code == 0
    assert f"{held.counts.prompt_tokens} prompt" in stdout
    assert str(tiny_folder) in stdout
    assert stdout.count("\n--- ") == 2
    assert next(iter(held)).question.replace(" ", "") in stdout.replace(" ", "")


def test_traces_inspect_without_the_model(rac, trace_store, tmp_path):
    from rac_modifier.traces.records import encode

    held = TraceStore.read(trace_store)
    moved = tmp_path / "moved.jsonl"
    header = held.header.model_copy(update={"model": str(tmp_path / "gone")})
    moved.write_bytes(encode("header", header) + b"".join(encode("trace", t) for t in held))
    code, stdout, stderr = rac("traces", "inspect", moved)
    assert (code, "--model" in stderr) == (2, True)
    assert "traces " in stdout  # what needs no tokenizer is said all the same
    assert rac("traces", "inspect", moved, "--samples", 0)[0] == 0
    assert rac("traces", "inspect", moved, "--model", held.header.model)[0] == 0


def test_schema_prints_the_published_file_and_nothing_else():
    """In a process of its own: llm-compressor logs to standard output while it is imported."""
    published = Path(__file__).parents[2] / "docs" / "recipe.schema.json"
    done = subprocess.run([sys.executable, "-m", "rac_modifier.cli", "schema"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, published.read_text())


def test_a_mistake_ends_in_one_message_and_exit_code_2(rac, tiny_folder, recipe_file, tmp_path):
    code, stdout, stderr = rac("prune", tiny_folder, tmp_path / "out", "-r", recipe_file, "-s", "solver=admm")
    assert code == 2
    assert stderr.startswith("error: ")
    assert "'admm'" in stderr
    assert "Traceback" not in stderr + stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "args",
    [("eval", "x", "--problems", "0"), ("eval", "x", "--precision", "fp99"), ("eval", "x", "--cap", "-1"), ("prune",)],
    ids=" ".join,
)
def test_what_typer_refuses(rac, args):
    assert rac(*args)[0] == 2


@pytest.mark.slow
def test_the_embedded_reasoner_end_to_end(rac, recipe_file, tmp_path):
    """The README's commands, small: the pruned reasoner still reasons."""
    out = tmp_path / "out"
    options = ["-r", recipe_file, "-s", f"traces.store={tmp_path / 's.jsonl'}", "-s", "calibration.tokens=16384",
               "-s", "traces.sampling.max_new_tokens=512", "-s", "calibration.batch_tokens=4096"]  # fmt: skip
    assert rac("prune", "reasoner", out, *options, "--precision", "float32")[0] == 0
    results = tmp_path / "eval.json"
    code, _, _ = rac("eval", out, "--problems", 40, "--cap", 512, "--precision", "float32", "--json", results)
    assert code == 0
    assert json.loads(results.read_text())["results"][0]["accuracy"] > 0.6


def test_estimate_names_each_preset_and_loads_no_weights(rac, recipe_file, tmp_path):
    from transformers import AutoConfig

    from rac_modifier import reasoner_path

    AutoConfig.from_pretrained(reasoner_path()).save_pretrained(tmp_path / "config-only")
    code, out, err = rac("estimate", tmp_path / "config-only", "-r", recipe_file, "--set", "calibration.tokens=1000")
    assert code == 0, err
    assert "1,000 tokens" in out
    costs = {line.split()[0]: float(line.split()[1]) for line in out.splitlines() if line.startswith(("q", "fa", "pa"))}
    assert costs.keys() == {"quality", "fast", "paper"}
    assert costs["paper"] < costs["fast"] < costs["quality"]
