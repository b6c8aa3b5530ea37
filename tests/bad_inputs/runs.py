"""Mistakes about the recipe and the run."""

from __future__ import annotations

import fcntl
import shutil

import torch

from tests.bad_inputs.bench import Bench, Case, Cases
from tests.tiny import NAME, entry, linears, save_tiny, tiny_tokenizer

CASES = Cases()

CASES += [
    Case(
        "a recipe that is not there", "no recipe at", lambda b: b.rac("prune", b.folder, b.tmp / "o", "-r", "no.yaml")
    ),
    Case(
        "a misspelt name of a shipped recipe",
        "did you mean rac_2of4",
        lambda b: b.rac("prune", b.folder, b.tmp / "o", "-r", "rac_2of5"),
    ),
    Case("a recipe that is not YAML", "is not YAML", lambda b: b.rac_prune("pruning_stage: [")),
    Case(
        "a setting that does not exist",
        "calibration.token: there is no such setting (value 5)",
        lambda b: b.check(calibration={"token": 5}),
    ),
    Case(
        "a setting in another group",
        "tokens: there is no such setting (value 5); did you mean calibration.tokens or recover.tokens?",
        lambda b: b.check(tokens=5),
    ),
    Case(
        "a misspelt setting",
        "traces.sample: there is no such setting (value {'seed': 1}); did you mean traces.sampling?",
        lambda b: b.check(traces={"sample": {"seed": 1}}),
    ),
    Case(
        "a setting like no other",
        "calibration.gpu: there is no such setting (value 1); use calibration.tokens, calibration.mixture",
        lambda b: b.check(calibration={"gpu": 1}),
    ),
    Case("an empty recipe", "recipe.yaml is empty; write it as pruning_stage:", lambda b: b.rac_prune("")),
    Case(
        "a recipe without this modifier",
        f"has no {NAME} or ReasoningAwareCalibrationModifier",
        lambda b: b.rac_prune("s_stage: {m_modifiers: {SparseGPTModifier: {sparsity: 0.5}}}"),
    ),
    Case(
        "a misspelt name of the modifier",
        f"ReasoningAwareSparseGptModifier is no modifier; did you mean {NAME}?",
        lambda b: b.rac_prune("s_stage: {m_modifiers: {ReasoningAwareSparseGptModifier: {sparsity: 0.5}}}"),
    ),
    Case(
        "a stage without its suffix, which llm-compressor overlooks",
        "llm-compressor would overlook pruning: pruning_modifiers",
        lambda b: b.rac_prune(f"pruning: {{pruning_modifiers: {{{NAME}: {{sparsity: 0.5}}}}}}"),
    ),
    Case("`--set` without a value", "is not key=value", lambda b: b.rac_prune(None, "o", None, "-s", "sparsity")),
    Case(
        '`oneshot(pipeline="basic")`',
        'pipeline="basic" does not prune layer by layer',
        lambda b: b.prune(pipeline="basic"),
    ),
]


CASES += [
    Case(
        "both of this package's modifiers in one recipe file",
        f"has ReasoningAwareCalibrationModifier and {NAME}; leave one of them out",
        lambda b: b.rac_prune(
            f"s_stage: {{a_modifiers: {{{NAME}: }}, b_modifiers: {{ReasoningAwareCalibrationModifier: }}}}"
        ),
    ),
    Case(
        "a preset that does not exist",
        "preset: must be 'quality', 'fast' or 'paper'",
        lambda b: b.check(preset="best"),
    ),
    Case(
        "`order: layer` beside a dense target",
        "order: layer has no dense activations to aim at; set reconstruct: pruned, or order: auto",
        lambda b: b.check(order="layer"),
    ),
]


@CASES.case("`order: group` where the model cannot be traced", "order: group is not possible here: tracing failed")
def _(b: Bench) -> None:
    from rac_modifier.llmcompressor import pipeline
    from rac_modifier.llmcompressor.stages import UntraceableError

    def fails(*args: object) -> None:
        raise UntraceableError("tracing failed: a loop over experts")

    b.monkeypatch.setattr(pipeline, "trace_stages", fails)
    b.prune_with(order="group")


@CASES.case("`experts: all` for a model without experts", "experts: 'all' has no effect here: no routed expert")
def _(b: Bench) -> None:
    b.prune_with(experts="all")


@CASES.case("`oneshot(dataset=...)` beside the recipe", "leave the dataset argument out")
def _(b: Bench) -> None:
    from torch.utils.data import DataLoader

    b.prune(dataset=DataLoader([{"input_ids": torch.arange(2, 20)}], batch_size=1))


@CASES.case(
    "`oneshot(num_calibration_samples=...)` beside the recipe",
    "leave the num_calibration_samples argument out; set calibration.tokens in the recipe",
)
def _(b: Bench) -> None:
    b.prune(num_calibration_samples=64)


@CASES.case(
    "`oneshot(max_seq_length=...)` beside the recipe",
    "leave the max_seq_length argument out; set calibration.max_sequence_tokens in the recipe",
)
def _(b: Bench) -> None:
    b.prune(max_seq_length=2048)


@CASES.case("a tokenizer in `oneshot` and another in the recipe", "leave one of them out")
def _(b: Bench) -> None:
    tiny_tokenizer().save_pretrained(b.tmp / "other")
    b.prune(settings={"tokenizer": str(b.folder / ".." / b.folder.name)}, tokenizer=str(b.tmp / "other"))


@CASES.case("`oneshot(output_dir=...)` with a folder that is not empty", "is in use; name an empty or a new one")
def _(b: Bench) -> None:
    b.prune(output_dir=str(b.tmp))


@CASES.case("an output folder below a file", "traces.jsonl is a file, so no folder can be made in it; name another")
def _(b: Bench) -> None:
    b.rac_prune(out="traces.jsonl/out")


@CASES.case("more tokens than fit into memory", "set a lower calibration.tokens")
def _(b: Bench) -> None:
    b.monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 2**20}))
    b.prune()


@CASES.case("this modifier twice in one recipe", f"the recipe has two {NAME}")
def _(b: Bench) -> None:
    from rac_modifier import ReasoningAwareSparseGPTModifier

    b.prune(later=(ReasoningAwareSparseGPTModifier(**entry(b.store)),))


@CASES.case(
    "torchrun with `oneshot`, and nobody joined the processes", "call torch.distributed.init_process_group() first"
)
def _(b: Bench) -> None:
    b.monkeypatch.setenv("WORLD_SIZE", "2")
    b.prune()


@CASES.case(
    "more processes than batches of the calibration set", "start at most 1, or set a lower calibration.batch_tokens"
)
def _(b: Bench) -> None:
    from rac_modifier.calibration.loader import CalibrationLoader
    from rac_modifier.calibration.mixture import CalibrationSequence, compose
    from rac_modifier.settings.calibration import CalibrationSettings

    sequences = [CalibrationSequence((5, 6, 7), 1, "traces")]
    CalibrationLoader(sequences, compose(sequences), CalibrationSettings(), 0).share(1, 2)


@CASES.case("more processes than can share a calibration set", "start 24 or fewer")
def _(b: Bench) -> None:
    from rac_modifier.calibration.loader import CalibrationLoader
    from rac_modifier.calibration.mixture import CalibrationSequence, compose
    from rac_modifier.settings.calibration import CalibrationSettings

    sequences = [CalibrationSequence((5,) * 16, 1, "traces")] * 32
    CalibrationLoader(sequences, compose(sequences), CalibrationSettings(batch_tokens=16), 0).share(1, 32)


@CASES.case("processes on several machines", "start it with --nnodes 1")
def _(b: Bench) -> None:
    from rac_modifier.processes import present_processes

    b.monkeypatch.setenv("WORLD_SIZE", "4")
    b.monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    b.monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    present_processes()


@CASES.case("torchrun with other modifiers that calibrate", "beside GPTQModifier runs in one process")
def _(b: Bench) -> None:
    from llmcompressor.modifiers.quantization import GPTQModifier

    from rac_modifier.processes import Processes

    two = Processes(0, 2)
    b.monkeypatch.setattr("rac_modifier.llmcompressor.calibrating_modifier.present_processes", lambda: two)
    b.prune(later=(GPTQModifier(scheme="W4A16", ignore=["lm_head"]),))


@CASES.case(
    "`rac recover --set` of a setting that does not exist",
    "--set: tokns: there is no such setting (value 5); did you mean tokens?",
)
def _(b: Bench) -> None:
    b.rac("recover", b.folder, b.folder, b.tmp / "out", "--set", "tokns=5")


@CASES.case(
    "two runs that recover one model in one folder", "is in use by another process (pid 1), which recovers the same"
)
def _(b: Bench) -> None:
    folder = b.tmp / "recovery"
    folder.mkdir()
    with (folder / ".lock").open("w") as lock:
        lock.write("1")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        b.prune_with(recover={"tokens": 200, "held_out_tokens": 64, "folder": str(folder)})


@CASES.case(
    "`rac recover` with the sparse model in the place of the dense one", "the first model has to be the dense one"
)
def _(b: Bench) -> None:
    from transformers import AutoModelForCausalLM

    folder = save_tiny(b.tmp / "sparse")
    model = AutoModelForCausalLM.from_pretrained(folder)
    for linear in linears(model).values():
        linear.weight.data[:, ::2] = 0.0
    model.save_pretrained(folder)
    b.rac("recover", folder, b.folder, b.tmp / "out")


@CASES.case(
    "LoRA adapters with dropout on a sparse model, in `fixed_mask`",
    "lora_dropout cannot be masked; set lora_dropout=0.0",
)
def _(b: Bench) -> None:
    from peft import LoraConfig, get_peft_model

    from rac_modifier.recovery.fixed_mask import fixed_mask
    from tests.recovery.recovery_helpers import dense_and_sparse

    with fixed_mask(get_peft_model(dense_and_sparse()[1], LoraConfig(target_modules=["q_proj"], lora_dropout=0.1))):
        pass


def _killed(b: Bench, about: dict[str, object], calibrated: dict[str, object]) -> None:
    """A group of a run that was killed, in a folder; and the start of a run that would go on from there."""
    from rac_modifier.llmcompressor import finished_groups

    b.monkeypatch.setattr(finished_groups, "_SAVE_SECONDS", 0.0)
    first = finished_groups.FinishedGroups(b.tmp / "out.unfinished", ABOUT)
    first.begin(CALIBRATED)
    first.add({"m": torch.nn.Linear(2, 2)}, {"m": {}}, {})
    finished_groups.FinishedGroups(b.tmp / "out.unfinished", {**ABOUT, **about}).begin({**CALIBRATED, **calibrated})


ABOUT = {"recipe": {"sparsity": 0.5}, "model": "f" * 64, "made with": {"torch": "2.9.0"}}
CALIBRATED = {"calibration set": "a" * 64, "trace stores": {"traces: t.jsonl": "sha256 aa"}}

CASES += [
    Case(
        "a killed run that goes on with another recipe",
        "holds what a run with another recipe has pruned (sparsity: 0.5 there, 0.6 here); start that run again to go on with it",
        lambda b: _killed(b, {"recipe": {"sparsity": 0.6}}, {}),
    ),
    Case(
        "a killed run that goes on with another model",
        "holds what a run with another model has pruned; start that run again to go on with it",
        lambda b: _killed(b, {"model": "e" * 64}, {}),
    ),
    Case(
        "a killed run that goes on with another trace store",
        "has pruned, since a trace store is another one (traces: t.jsonl sha256 aa, now sha256 bb)",
        lambda b: _killed(b, {}, {"calibration set": "b" * 64, "trace stores": {"traces: t.jsonl": "sha256 bb"}}),
    ),
    Case(
        "a killed run that goes on with another version of torch",
        "that was begun with torch 2.9.0, now 2.10.0, and would not end with the same bits: use the same",
        lambda b: _killed(b, {"made with": {"torch": "2.10.0"}}, {}),
    ),
]


@CASES.case("a damaged file of what a killed run has pruned", "group-00000.safetensors: cannot be read")
def _(b: Bench) -> None:
    _killed(b, {}, {})
    (b.tmp / "out.unfinished" / "group-00000.safetensors").write_bytes(b"half")
    _killed(b, {}, {})


@CASES.case("an output folder beside which nothing can be written", "is not a folder that can be written to")
def _(b: Bench) -> None:
    (b.tmp / "out.unfinished").write_text("a file")
    b.rac_prune()


@CASES.case("no room on disk for what is pruned so far", "and what is pruned so far up to")
def _(b: Bench) -> None:
    size = sum(file.stat().st_size for file in b.folder.glob("*.safetensors"))
    b.monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 2 * size))
    b.rac_prune()


@CASES.case(
    "traces to be sampled by a model that does not fit on the accelerator", "fill the trace store with a server first"
)
def _(b: Bench) -> None:
    from rac_modifier import model_tools
    from rac_modifier.calibration import trace_budget

    for module in (model_tools, trace_budget):
        b.monkeypatch.setattr(module, "accelerator", lambda: torch.device("cuda"))
    b.monkeypatch.setattr(model_tools, "free_bytes", lambda device: 2**20)
    b.prune(settings={"traces": entry(b.tmp / "new.jsonl")["traces"]})


@CASES.case("a model that is larger than the memory of the host", "GiB of the host's memory, and")
def _(b: Bench) -> None:
    b.monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 1000}))
    b.rac_prune()
