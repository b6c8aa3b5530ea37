"""Pruning in several processes over gloo: the bits of one, killed or not, and one clear end."""

from pathlib import Path

import pytest

from tests.llmcompressor import several_processes
from tests.llmcompressor.modifier_helpers import INT8
from tests.llmcompressor.several_processes import FAULTS
from tests.llmcompressor.test_resume import result
from tests.started import started_forks
from tests.tiny import entry, recipe, save_tiny_experts

pytestmark = pytest.mark.slow
SCRIPT = "a user's script"
KILLS = list(FAULTS)
Ends = dict[str, list[tuple[int, str]]]  # exit code and standard error by rank, by scenario


@pytest.fixture(scope="module")
def ran(tiny_folder, trace_store, tmp_path_factory) -> tuple[Path, Ends]:
    folder = tmp_path_factory.mktemp("processes")
    # about 14 batches, so that two and four processes have some in each of several shards
    calibration = {"tokens": 1500, "batch_tokens": 128, "held_out_tokens": 100}
    recover = {"learning_rate": 1e-4, "tokens": 300, "held_out_tokens": 100, "step_tokens": 128}
    settings = {
        "paper": {"preset": "paper", "calibration": calibration},
        "quality": {"calibration": calibration},
        "recovered": {"calibration": calibration, "quantization": INT8, "recover": recover},
    }
    for name, changes in settings.items():
        (folder / f"{name}.yaml").write_text(recipe(entry(trace_store, **changes)))
    mixture = save_tiny_experts(folder / "mixture")
    of_experts = {"solver": "sparsegpt", "expert_floor": 700, "calibration": calibration}
    (folder / "experts.yaml").write_text(recipe(entry(folder / "mixture.jsonl", **of_experts)))
    ends: Ends = {}

    def run(name: str, recipe: str, count: int = 2, output: str = "", model=tiny_folder) -> None:
        words = [name, str(model), output or name, f"{recipe}.yaml"]
        ends[name] = started_forks(several_processes.main, words, folder, count)

    run("paper-4", "paper", 4)
    run("quality-1", "quality", 1)
    for count in (1, 2):
        run(f"experts-{count}", "experts", count, model=mixture)
        run(f"recovered-{count}", "recovered", count)
    run(SCRIPT, "paper", output="script")
    for moment in KILLS:  # each kill meets the run that those before it left
        run(moment, "quality", output="killed")
    run("killed", "quality")
    return folder, ends


def codes(ran, name: str) -> list[int]:
    return [code for code, _ in ran[1][name]]


def errors(ran, name: str, rank: int) -> list[str]:
    """The lines of a process that are errors or of a traceback."""
    lines = ran[1][name][rank][1].splitlines()
    return [line for line in lines if line.startswith(("error:", "Traceback"))]


def assert_as_one(ran, name: str, one: str) -> None:
    """The run of two processes ended well, with the bytes and the record of one."""
    folder, ends = ran
    assert codes(ran, name) == [0, 0], ends[name]
    (expected, bytes_of_one), (record, actual) = result(folder / one), result(folder / name)
    assert actual == bytes_of_one
    assert record.pop("processes") == 2
    assert record == expected
    assert not (folder / f"{name}.unfinished").exists()


def test_any_number_of_processes_saves_the_bytes_of_one(ran):
    """Experts are filled up to the floor with tokens of all processes."""
    assert_as_one(ran, "experts-2", "experts-1")
    record, _ = result(ran[0] / "experts-2")
    assert any(layer["starved"] for layer in record["experts"]["layers"].values())
    assert min(row["tokens"] for row in record["modules"]) >= 700


def test_oneshot_of_upstream_under_torchrun_does_the_same(ran):
    """Two processes of a user's script, next to four of `rac prune`."""
    assert (codes(ran, SCRIPT), codes(ran, "paper-4")) == ([0] * 2, [0] * 4), ran[1][SCRIPT]
    assert result(ran[0] / "script")[1] == result(ran[0] / "paper-4")[1]


def test_recovery_of_quantized_weights_ends_as_in_one_process(ran):
    folder, ends = ran
    assert codes(ran, "recovered-2") == [0, 0], ends["recovered-2"]
    one, two = (result(folder / f"recovered-{count}")[0]["recovery"] for count in (1, 2))
    assert (one["processes"], two["processes"]) == (1, 2)
    assert two["kl_after"] < two["kl_before"]
    assert two["kl_before"] == pytest.approx(one["kl_before"], rel=1e-3)
    # training adds up gradients in the order of FSDP, and measures batches of other shapes
    assert two["kl_after"] == pytest.approx(one["kl_after"], rel=0.02)
    assert not (folder / "rac_recovery").exists()


def test_a_run_that_is_killed_at_any_moment_ends_as_an_undisturbed_one(ran):
    """The other process ends with one line; the next start goes on from what was written."""
    for moment in KILLS:
        ends = codes(ran, moment)
        assert ends.pop(FAULTS[moment][0]) == -9, moment
        assert ends == [1], moment
    (line,) = errors(ran, KILLS[0], 0)
    assert "another of the 2 processes has ended" in line
    assert_as_one(ran, "killed", "quality-1")
