"""`rac recover`: what it trains on, and what it writes."""

import json
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import rac_modifier
from rac_modifier.errors import RacError
from rac_modifier.measure.repeats import end_of_copies
from rac_modifier.recovery import stage
from rac_modifier.recovery.training_loop import TrainingLoop
from rac_modifier.settings.problems import ProblemSource
from rac_modifier.traces.store import TraceStore
from tests import tiny
from tests.checkpoint.checkpoint_helpers import dense_tensors, save_rounded
from tests.cli.conftest import OPTIONS
from tests.llmcompressor.quantized_helpers import SCHEMES, saved
from tests.tiny import EXPERTS, entry, linears, recipe, save_tiny, save_tiny_experts


def test_a_sparse_int4_checkpoint_is_trained_through_its_codes_and_packed_again(
    rac, tiny_folder, trace_store, tmp_path
):
    weights = {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": True}
    quantization = {"config_groups": {"g": {"weights": weights}}}
    (tmp_path / "recipe.yaml").write_text(recipe(entry(trace_store, quantization=quantization)))
    changed = ("-s", "calibration.tokens=500", "-s", "calibration.held_out_tokens=200")
    assert rac("prune", tiny_folder, "sparse", "-r", "recipe.yaml", *changed)[0] == 0
    rac.output("recover", tiny_folder, "sparse", "out", *OPTIONS)
    before, after = (dense_tensors(tmp_path / folder) for folder in ("sparse", "out"))
    assert before.keys() == after.keys()
    codes = [name for name, tensor in before.items() if tensor.dtype == torch.int8]
    assert len(codes) == 14
    for name in codes:
        assert not bool(after[name][before[name] == 0].any()), name
        assert tiny.is_2of4(after[name]), name
    assert any(not torch.equal(after[name], before[name]) for name in codes)
    record = json.loads((tmp_path / "out" / "rac_run.json").read_text())
    assert record["recovery"]["kl_after"] < record["recovery"]["kl_before"]
    assert record["quantization"] == ["int4 in groups of 32 (pack-quantized)"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["sparsity_config"]["format"] == "sparse-24-bitmask"
    sparse = json.loads((tmp_path / "sparse" / "rac_run.json").read_text())
    layers = [run["activations"]["layers"] for run in (sparse, record)]
    assert [row["own_error"] for row in layers[0].values()] == [
        row["own_error"] for row in layers[1].values()
    ]
    eight = [name for name, row in layers[1].items() if row["bits"] == 8]
    assert config["rac_sparsity"]["int8_activations"] == sorted(eight)
    assert eight


def test_prompts_are_those_that_calibrated_the_checkpoint(
    rac, tiny_folder, sparse_folder, tmp_path
):
    """A base model has no chat template, and cannot be asked with one."""
    sparse = shutil.copytree(sparse_folder, tmp_path / "sparse")
    record = json.loads((sparse / "rac_run.json").read_text())
    record["prompts"] = {"traces": {"template": "none", "system_prompt": None, "thinking": True}}
    (sparse / "rac_run.json").write_text(json.dumps(record))
    rac.output("recover", tiny_folder, sparse, "out", *OPTIONS)
    (store,) = (tmp_path / "rac_traces").glob("*.jsonl")
    assert TraceStore.read(store).header.sampling.template == "none"


def test_the_result_keeps_every_zero_and_an_output_that_cannot_be_written_costs_no_training(
    rac, tiny_folder, sparse_folder, tmp_path, monkeypatch
):
    steps = []
    step = TrainingLoop.step
    monkeypatch.setattr(TrainingLoop, "step", lambda *args: (steps.append(1), step(*args))[1])

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("rac_modifier.checkpoint.saving.pack_checkpoint", full)
        code, _, stderr = rac("recover", tiny_folder, sparse_folder, "out", *OPTIONS)
    assert code == 1
    assert "out: the recovered model cannot be written ([Errno 28] No space left" in stderr
    assert not (tmp_path / "out").exists()

    def another_run(*args, **options):
        shutil.copytree(sparse_folder, "out", dirs_exist_ok=True)
        raise RacError("out holds a checkpoint")

    with monkeypatch.context() as patch:
        patch.setattr("rac_modifier.checkpoint.saving.pack_checkpoint", another_run)
        assert rac("recover", tiny_folder, sparse_folder, "out", *OPTIONS)[0] == 1
    assert (tmp_path / "out" / "config.json").exists()
    shutil.rmtree("out")
    assert steps.pop()
    steps.clear()
    stdout = rac.output("recover", tiny_folder, sparse_folder, "out", *OPTIONS)
    assert steps == []
    assert "held-out KL" in stdout
    assert not (tmp_path / "rac_recovery").exists()
    before, after = (linears(rac_modifier.load_model(folder)) for folder in (sparse_folder, "out"))
    for name, module in after.items():
        assert torch.equal(module.weight == 0, before[name].weight == 0), name
    assert any(not torch.equal(m.weight, before[name].weight) for name, m in after.items())


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let no file grow beyond so many bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# By the largest file that fits: what is there after the refusal.
FULL = {0: [], 100: ["rac_traces"], 60_000: ["rac_recovery", "rac_traces"]}


def test_a_full_disk_costs_nothing(rac, tiny_folder, sparse_folder, tmp_path, monkeypatch):
    """It is full for the lock, the traces, the dense model's states, and the state of training."""
    monkeypatch.setattr("rac_modifier.recovery.training_loop._SAVE_SECONDS", 0.0)
    words = ["recover", tiny_folder, sparse_folder]
    sparse = (sparse_folder / "model.safetensors").read_bytes()
    rac.output(*words, "undisturbed", *OPTIONS)
    shutil.rmtree("rac_traces")
    for size, left in FULL.items():
        with largest_file(size):
            code, _, said = rac(*words, "out", *OPTIONS)
        assert (code, "error: " in said) == (1, True), said  # a logger may have no room either
        assert sorted(path.name for path in tmp_path.glob("rac_*")) == left
        assert not (tmp_path / "out").exists()
    with largest_file(700_000):  # training goes on without a state
        rac.output(*words, "out", *OPTIONS)
    expected, actual = (Path(name, "model.safetensors") for name in ("undisturbed", "out"))
    assert actual.read_bytes() == expected.read_bytes()
    assert (sparse_folder / "model.safetensors").read_bytes() == sparse


def test_a_dense_int3_checkpoint_stays_dense_and_is_trained_too(rac, tmp_path):
    """All but its head, which is written back."""
    folder = save_tiny(tmp_path / "dense")
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    shutil.copytree(folder, tmp_path / "int3")
    saved(tmp_path / "int3", SCHEMES["int3"], pruned=False, ignore=())
    rac.output("recover", "dense", "int3", "out", *OPTIONS)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("int3", "out"))
    shapes = [{name: t.shape for name, t in tensors.items()} for tensors in (before, after)]
    assert shapes[0] == shapes[1]
    packed = [name for name in before if name.endswith("weight_packed")]
    assert len(packed) == 15
    changed = [name for name in packed if not torch.equal(before[name], after[name])]
    assert changed
    assert "lm_head.weight_packed" not in changed
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rac_sparsity"]["modules"] == {}
    record = json.loads((tmp_path / "out" / "rac_run.json").read_text())
    assert record["quantization"] == ["int3 in groups of 32 (pack-quantized)"]
    assert "pattern" not in record
    assert "quantized" in (tmp_path / "out" / "README.md").read_text()


def test_answers_of_the_checkpoint_that_end_in_copies_are_trained_on(rac, tmp_path, seen):
    """The next token of these models depends on the last one alone: greedy answers repeat."""
    for name in ("dense", "int3"):
        model = tiny.tiny_model().to(torch.bfloat16)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.data.zero_()
        if name == "dense":
            model.save_pretrained(name)
        else:
            save_rounded(model, tmp_path / name, SCHEMES["int3"])
        tiny.tiny_tokenizer().save_pretrained(name)
    rac.output("recover", "dense", "int3", "out", *OPTIONS, "--max-new-tokens", "300")
    model = rac_modifier.load_model("int3", dtype="auto")
    own = []
    for part in ("training", "held_out"):
        for ids, prompt in seen[part]:
            row = torch.tensor([ids])
            with torch.no_grad():
                predicted = model(row).logits[0, prompt - 1 : -1].argmax(-1)
            if torch.equal(predicted, row[0, prompt:]):
                own.append((part, end_of_copies(ids[prompt:]) is not None))
    assert set(own) == {("training", True), ("held_out", True)}
    record = json.loads((tmp_path / "out" / "rac_run.json").read_text())["recovery"]
    assert record["ending_in_copies"] >= own.count(("training", True))


@pytest.fixture
def seen(monkeypatch):
    """What a run trained on and held out."""
    sequences = {}
    train = stage.recover

    def spy(model, teacher, training, held_out, settings, **options):
        sequences.update(training=training, held_out=held_out)
        return train(model, teacher, training, held_out, settings, **options)

    monkeypatch.setattr(stage, "recover", spy)
    return sequences


def test_what_calibration_or_an_earlier_recovery_used_is_neither_trained_on_nor_held_out(
    rac, tiny_folder, trace_store, tmp_path, seen
):
    """Of one store, which each run finds too short and extends."""
    shutil.copy(trace_store, "store.jsonl")
    (tmp_path / "recipe.yaml").write_text(recipe(entry(tmp_path / "store.jsonl")))
    prune = ("prune", tiny_folder, "sparse", "-r", "recipe.yaml", "-s", "calibration.tokens=500")
    assert rac(*prune)[0] == 0
    used = {(*trace.prompt_ids, *trace.completion_ids) for trace in TraceStore.read("store.jsonl")}
    words = [*OPTIONS, "--traces", "store.jsonl"]
    for number, (given, output) in enumerate((("sparse", "once"), ("once", "twice"))):
        rac.output("recover", tiny_folder, given, output, *words)
        trained = {tuple(ids) for part in ("training", "held_out") for ids, _ in seen[part]}
        assert len(trained) > 20
        assert not trained & used, number
        used |= trained
    record = json.loads((tmp_path / "twice" / "rac_run.json").read_text())
    assert list(record["trace_stores"]) == ["traces", "recovery", "recovery 2"]
    assert record["prompts"].keys() == {"traces"}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), {"column": "problem"}),
        (("--column", "question"), {"column": "question"}),
        (("--problems", "a/c"), None),
    ],
)
def test_a_column_changes_no_more_than_the_column_of_the_stores_problems(
    rac, tiny_folder, sparse_folder, trace_store, tmp_path, monkeypatch, words, expected
):
    problems = {
        "source": "a/b", "split": "test", "config": "main", "column": "problem",
        "answer_column": "answer", "limit": 7,
    }  # fmt: skip
    header = TraceStore.read(trace_store).header
    header = header.model_copy(update={"problems": ProblemSource(**problems)})
    with TraceStore.open_append(tmp_path / "store.jsonl", header):
        pass
    asked = []
    monkeypatch.setattr(
        "rac_modifier.recovery.checkpoint.recover_checkpoint",
        lambda *given: asked.append(given[4].problems),
    )
    rac.output("recover", tiny_folder, sparse_folder, "out", "--traces", "store.jsonl", *words)
    new = {"source": "a/c"} if expected is None else problems | expected
    assert asked == [ProblemSource(**new)]


@pytest.mark.parametrize(
    ("models", "says"),
    [
        (("another", "sparse"), "was not made from this Qwen3ForCausalLM: their embeddings or"),
        (("dense", "dense"), "there is no mask to hold; prune the model first"),
        (("sparse", "dense"), "is sparse (14 of its 15 linear layers), and the first model has to"),
        (("int3", "sparse"), "int3 is quantized, and the first model has to be the dense one"),
        (("dense", "gptq"), "quantized by 'gptq'; recovery reads and writes compressed-tensors"),
    ],
)
def test_models_that_do_not_belong_together_are_refused(
    rac, tiny_folder, sparse_folder, tmp_path, models, says
):
    made = {"dense": tiny_folder, "sparse": sparse_folder}
    if "another" in models:
        save_tiny(tmp_path / "another", seed=5)
    if "int3" in models:
        saved(save_tiny(tmp_path / "int3"), SCHEMES["int3"], pruned=False)
    if "gptq" in models:
        path = shutil.copytree(tiny_folder, tmp_path / "gptq") / "config.json"
        quantization = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
        path.write_text(json.dumps(json.loads(path.read_text()) | quantization))
    code, _, stderr = rac("recover", *(made.get(name, name) for name in models), "out", *OPTIONS)
    assert code == 1
    assert says in " ".join(stderr.split())
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "rac_traces").exists()


def test_sparse_experts_are_trained_and_stay_sparse(rac, tmp_path):
    save_tiny_experts(tmp_path / "dense")
    (tmp_path / "recipe.yaml").write_text(recipe(entry(tmp_path / "traces.jsonl")))
    rac.output("prune", "dense", "sparse", "-r", "recipe.yaml", "-s", "calibration.tokens=500")
    rac.output("recover", "dense", "sparse", "out", *OPTIONS)
    before, after = (dense_tensors(tmp_path / folder) for folder in ("sparse", "out"))
    assert before.keys() == after.keys()
    experts = [name for name in before if ".experts." in name]
    assert len(experts) == 2 * 3 * EXPERTS
    for name in experts:
        assert tiny.is_2of4(after[name]), name
        assert not torch.equal(after[name], before[name]), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["sparsity_config"]["format"] == "sparse-24-bitmask"
