"""Mistakes about a run: oneshot's arguments, folders, memory, processes, resuming, recovery."""

from tests.bad_inputs.bench import Bench, Cases
from tests.tiny import NAME, entry

CASES = Cases()


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


@CASES.case("torchrun with other modifiers that calibrate", "GPTQModifier runs in one process")
def _(b: Bench) -> None:
    from llmcompressor.modifiers.quantization import GPTQModifier

    from rac_modifier.llmcompressor import calibration_modifier
    from rac_modifier.processes import Processes

    b.monkeypatch.setattr(calibration_modifier, "present_processes", lambda: Processes(0, 2))
    b.prune(later=(GPTQModifier(scheme="W4A16", ignore=["lm_head"]),))
