"""Mistakes about runs in several processes."""

from __future__ import annotations

from tests.bad_inputs.bench import Bench, Cases

CASES = Cases()


@CASES.case(
    "torchrun with `oneshot`, and nobody joined the processes",
    "call torch.distributed.init_process_group() first",
)
def _(b: Bench) -> None:
    b.monkeypatch.setenv("WORLD_SIZE", "2")
    b.prune()


@CASES.case(
    "more processes than batches of the calibration set",
    "start at most 1, or set a lower calibration.batch_tokens",
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
    CalibrationLoader(sequences, compose(sequences), CalibrationSettings(batch_tokens=16), 0).share(
        1, 32
    )


@CASES.case("processes on several machines", "start it with --nnodes 1")
def _(b: Bench) -> None:
    from rac_modifier.processes import present_processes

    b.monkeypatch.setenv("WORLD_SIZE", "4")
    b.monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    b.monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    present_processes()


@CASES.case(
    "torchrun with other modifiers that calibrate", "beside GPTQModifier runs in one process"
)
def _(b: Bench) -> None:
    from llmcompressor.modifiers.quantization import GPTQModifier

    from rac_modifier.processes import Processes

    two = Processes(0, 2)
    b.monkeypatch.setattr(
        "rac_modifier.llmcompressor.calibration_modifier.present_processes", lambda: two
    )
    b.prune(later=(GPTQModifier(scheme="W4A16", ignore=["lm_head"]),))
