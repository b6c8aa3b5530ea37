"""Other people's tools on the dataset of traces, as examples/ shows them, on the embedded
reasoner."""

import json
import runpy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rac_modifier.reasoner import reasoner_path
from rac_modifier.settings.pattern import Pattern
from rac_modifier.traces.store import TraceStore
from tests.pruning.pruning_reference import correlated_problem
from tests.pruning.solving import solve

EXAMPLES = Path(__file__).parents[2] / "examples"
TOKENS = 2048


def example(name):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Traces of the reasoner, which the first example samples."""
    return tmp_path_factory.mktemp("traces") / "traces.jsonl"


def loss(model, store):
    """Mean negative log-likelihood of the first completions, in nats per token."""
    losses = []
    for trace in list(TraceStore.read(store))[:8]:
        ids = torch.tensor([[*trace.prompt_ids, *trace.completion_ids]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, len(trace.prompt_ids) - 1 : -1].float()
        losses.append(torch.nn.functional.cross_entropy(logits, ids[0, len(trace.prompt_ids) :]))
    return float(torch.stack(losses).mean())


@pytest.fixture(scope="module")
def dense():
    return AutoModelForCausalLM.from_pretrained(reasoner_path(), dtype=torch.float32)


def test_a_plain_loop(store, dense, capsys):
    largest = example("traces_in_plain_pytorch")["main"](store=str(store), tokens=TOKENS)
    assert len(largest) == sum(isinstance(m, torch.nn.Linear) for m in dense.modules())
    assert f"{TOKENS // 512} rows of 512 tokens" in capsys.readouterr().out


def test_gptq_of_llmcompressor(store, dense, tmp_path, capsys):
    output = tmp_path / "gptq"
    example("traces_in_llmcompressor")["main"]("", str(output), str(store), tokens=TOKENS)
    assert f"{TOKENS // 512} rows of 512 tokens" in capsys.readouterr().out
    config = json.loads((output / "config.json").read_text())["quantization_config"]
    assert config["config_groups"]["group_0"]["weights"]["num_bits"] == 4
    quantized = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    assert loss(quantized, store) < loss(dense, store) + 0.3


def test_autoround(store, dense, tmp_path):
    output = tmp_path / "autoround"
    example("traces_in_autoround")["main"]("", str(output), str(store), tokens=TOKENS, iters=2)
    (config,) = output.rglob("config.json")
    assert json.loads(config.read_text())["quantization_config"]["bits"] == 4


def test_rows_for_gptqmodel(store):
    """Lists of ids, as `GPTQModel.quantize` takes them."""
    rows = example("traces_in_gptqmodel")["rows"](str(reasoner_path()), str(store), TOKENS)
    stored = {(*t.prompt_ids, *t.completion_ids) for t in TraceStore.read(store)}
    assert {tuple(row["input_ids"]) for row in rows} <= stored
    assert sum(len(row["input_ids"]) for row in rows) >= TOKENS
    assert all(row["attention_mask"] == [1] * len(row["input_ids"]) for row in rows)


def test_gptqmodel(store, dense, tmp_path, monkeypatch):
    """Not part of `make test`: needs an environment with gptqmodel, which builds from source."""
    monkeypatch.setenv("GPTQMODEL_CPU_WORKERS", "2")
    monkeypatch.chdir(tmp_path)  # it writes logs/ there
    gptqmodel = pytest.importorskip("gptqmodel")
    output = tmp_path / "gptqmodel"
    example("traces_in_gptqmodel")["main"]("", str(output), str(store), tokens=TOKENS)
    assert json.loads((output / "config.json").read_text())["quantization_config"]["bits"] == 4
    quantized = gptqmodel.GPTQModel.load(str(output), backend="torch", device="cpu").model
    assert loss(quantized, store) < loss(dense, store) + 0.3


def test_sft_trainer_of_trl(store, dense, tmp_path):
    output = tmp_path / "sft"
    mean = example("traces_in_trl")["main"]("", str(output), str(store), tokens=TOKENS, steps=2)
    assert mean == pytest.approx(loss(dense, store), abs=0.5), "completions alone count"
    assert loss(AutoModelForCausalLM.from_pretrained(output), store) < loss(dense, store) + 0.3


@pytest.mark.parametrize("tokens", [400, 60], ids=["full rank", "fewer tokens than inputs"])
def test_one_file_chooses_the_mask_of_the_package(tokens):
    weight, hessian = correlated_problem(24, 256, tokens)
    (solution,) = solve("sparsegpt", [weight], hessian, Pattern.n_of_m(2, 4))
    pruned, mask = example("rac_in_one_file")["sparsegpt"](weight, hessian)
    assert (mask == solution.mask).float().mean() > 0.999
    same = (mask == solution.mask).all(1)
    torch.testing.assert_close(pruned[same], solution.weight[same], rtol=1e-3, atol=1e-3)


def test_one_file_prunes_a_model(dense, tmp_path, capsys):
    functions = example("rac_in_one_file")
    model = AutoModelForCausalLM.from_pretrained(reasoner_path(), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(reasoner_path())
    torch.manual_seed(0)
    traces = functions["sample"](model, tokenizer, ["What is 2 + 3?", "What is 17 + 25?"], 64)
    assert all(trace[0, -1] == tokenizer.eos_token_id or len(trace[0]) > 64 for trace in traces)
    masks = functions["prune"](model, traces)
    assert len(masks) == 28
    for name, mask in masks.items():
        number, _, path = name.partition(".")
        weight = model.model.layers[int(number)].get_submodule(path).weight
        assert bool((weight[~mask] == 0).all())
        assert bool((mask.view(-1, 4).sum(1) <= 2).all())


def test_each_example_is_short():
    for path in EXAMPLES.glob("traces_in_*.py"):
        assert len(path.read_text().splitlines()) <= 60, path
    assert len((EXAMPLES / "rac_in_one_file.py").read_text().splitlines()) <= 150
