"""Mistakes about a run: oneshot's arguments, folders, memory, processes, resuming, recovery."""

from __future__ import annotations

import shutil

import torch

from tests.bad_inputs.bench import Bench, Case, Cases
from tests.tiny import NAME, entry, linears, save_tiny

CASES = Cases()

CASES += [
    Case(
        "`oneshot(num_calibration_samples=...)` next to the recipe",
        "leave the num_calibration_samples argument out",
        lambda b: b.prune(num_calibration_samples=64),
    ),
    Case(
        "an output folder below a file",
        "traces.jsonl is a file; name another folder",
        lambda b: b.rac_prune(out="traces.jsonl/out"),
    ),
    Case(
        "`rac recover --set` of a setting that does not exist",
        "--set: tokns: there is no such setting (value 5); did you mean tokens?",
        lambda b: b.rac("recover", b.folder, b.folder, b.tmp / "out", "--set", "tokns=5"),
    ),
]


@CASES.case("more tokens than fit into memory", "set a lower calibration.tokens")
def _(b: Bench) -> None:
    b.monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 2**20}))
    b.prune()


@CASES.case(
    "this modifier twice in one recipe",
    f"{NAME} has no effect next to another modifier that calibrates the whole recipe",
)
def _(b: Bench) -> None:
    from rac_modifier import ReasoningAwareSparseGPTModifier

    b.prune(later=(ReasoningAwareSparseGPTModifier(**entry(b.store)),))


@CASES.case(
    "torchrun with `oneshot`, and nobody joined the processes",
    "call torch.distributed.init_process_group() first",
)
def _(b: Bench) -> None:
    b.monkeypatch.setenv("WORLD_SIZE", "2")
    b.prune()


@CASES.case("processes on several machines", "start it with --nnodes 1")
def _(b: Bench) -> None:
    from rac_modifier.processes import present_processes

    b.monkeypatch.setenv("WORLD_SIZE", "4")
    b.monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    b.monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    present_processes()


@CASES.case(
    "torchrun with other modifiers that calibrate", "next to GPTQModifier runs in one process"
)
def _(b: Bench) -> None:
    from llmcompressor.modifiers.quantization import GPTQModifier

    from rac_modifier.processes import Processes

    two = Processes(0, 2)
    b.monkeypatch.setattr(
        "rac_modifier.llmcompressor.calibration_modifier.present_processes", lambda: two
    )
    b.prune(later=(GPTQModifier(scheme="W4A16", ignore=["lm_head"]),))


@CASES.case("no room on disk for what is pruned so far", "and what is pruned so far up to")
def _(b: Bench) -> None:
    size = sum(file.stat().st_size for file in b.folder.glob("*.safetensors"))
    b.monkeypatch.setattr(
        shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 2 * size)
    )
    b.rac_prune()


@CASES.case(
    "traces to be sampled by a model that does not fit on the accelerator",
    "fill the trace store with a server first",
)
def _(b: Bench) -> None:
    from rac_modifier import model_tools

    b.monkeypatch.setattr(model_tools, "accelerator", lambda: torch.device("cuda"))
    b.monkeypatch.setattr(model_tools, "free_bytes", lambda device: 2**20)
    b.prune(settings={"traces": entry(b.tmp / "new.jsonl")["traces"]})


def _killed(b: Bench, **recipe: object) -> None:
    """A group of a run that was killed, and the start of a run that would go on from there."""
    from rac_modifier.llmcompressor import resume

    about = {"recipe": {"sparsity": 0.5}, "model": "f" * 64, "environment": {"torch": "2.9.0"}}
    calibrated = {"calibration set": "a" * 64, "trace stores": {"traces: t.jsonl": "sha256 aa"}}
    first = resume.Resume(b.tmp / "out.unfinished", about)
    first.begin(calibrated)
    first.add({"m": torch.nn.Linear(2, 2)}, {"m": {}}, {})
    again = resume.Resume(
        b.tmp / "out.unfinished", {**about, "recipe": {"sparsity": 0.5, **recipe}}
    )
    again.begin(calibrated)


@CASES.case(
    "a killed run that goes on with another recipe",
    "holds what a run with another recipe has pruned (sparsity: 0.5 there, 0.6 here); "
    "start that run again to go on with it",
)
def _(b: Bench) -> None:
    _killed(b, sparsity=0.6)


@CASES.case(
    "a damaged file of what a killed run has pruned", "group-00000.safetensors: cannot be read"
)
def _(b: Bench) -> None:
    _killed(b)
    (b.tmp / "out.unfinished" / "group-00000.safetensors").write_bytes(b"half")
    _killed(b)


@CASES.case(
    "`rac recover` with the sparse model in the place of the dense one",
    "the first model has to be the dense one",
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

    with fixed_mask(
        get_peft_model(
            dense_and_sparse()[1], LoraConfig(target_modules=["q_proj"], lora_dropout=0.1)
        )
    ):
        pass
