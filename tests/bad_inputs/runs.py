"""Mistakes about a run: oneshot's arguments, folders, memory, processes, resuming, recovery."""

from tests.bad_inputs.bench import Bench, Cases
from tests.meeting import Threads, together
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


@CASES.case("a machine with another version of torch", "has another torch than process 0 on")
def _(b: Bench) -> None:
    together(2, lambda processes: processes.check_same({"torch": f"2.{processes.rank}"}))


@CASES.case("a machine with another model", "has another model than process 0 on")
def _(b: Bench) -> None:
    together(2, lambda processes: processes.check_same({"model": f"{processes.rank}a7f"}))


@CASES.case("a machine whose clock is an hour ahead", "differs by +3,600 s from that of process 0")
def _(b: Bench) -> None:
    import threading

    def ahead(processes: Threads) -> None:
        hours.rank = processes.rank
        processes.check_clocks()

    hours = threading.local()
    b.monkeypatch.setattr("time.time", lambda: 3600.0 * getattr(hours, "rank", 0))
    together(2, ahead)


@CASES.case("a port on which another program listens", "torchrun --master-port names another")
def _(b: Bench) -> None:
    import socket

    from rac_modifier.distributed import machines

    b.monkeypatch.setattr(machines, "_JOIN", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        place = zip(("MASTER_ADDR", "MASTER_PORT"), silent.getsockname(), strict=True)
        for name, value in [*place, ("RANK", 1), ("WORLD_SIZE", 2)]:
            b.monkeypatch.setenv(name, str(value))
        machines.connect()


@CASES.case("`rac eval --json` onto a file of a model", "is there, and not of an earlier rac eval")
def _(b: Bench) -> None:
    config = b.tmp / "config.json"
    config.write_text('{"model_type": "qwen3"}')
    b.rac("eval", b.folder, "--json", config)


@CASES.case("torchrun with other modifiers that calibrate", "GPTQModifier runs in one process")
def _(b: Bench) -> None:
    from llmcompressor.modifiers.quantization import GPTQModifier

    from rac_modifier.distributed.processes import Processes
    from rac_modifier.llmcompressor import calibration_modifier

    b.monkeypatch.setattr(calibration_modifier, "present_processes", lambda: Processes(0, 2))
    b.prune(later=(GPTQModifier(scheme="W4A16", ignore=["lm_head"]),))
