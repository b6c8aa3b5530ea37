"""What `make gpu-check` runs, with its limits; parts that take too long, fail or cannot run are small commands here."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu_check

    monkeypatch.setattr(gpu_check, "GRACE", 1.0)
    return gpu_check


def part(benchmark, name: str, code: str, seconds: float = 60, needs: tuple[str, ...] = ()):
    return benchmark.Part(name, ("-c", code), seconds, f"what {name} finds", needs)


def test_all_parts_end_within_ten_minutes(benchmark, monkeypatch):
    monkeypatch.undo()  # of the shorter grace
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    assert sum(each.seconds + 2 * benchmark.GRACE for each in benchmark.PARTS) <= 600
    kernels = benchmark.PARTS[0].arguments
    assert float(kernels[kernels.index("--seconds") + 1]) < benchmark.PARTS[0].seconds
    for each in benchmark.PARTS:
        for path in (argument for argument in each.arguments if argument.startswith("/")):
            assert Path(path).exists()


def test_make_runs_it():
    rule = (ROOT / "Makefile").read_text().split("\ngpu-check:")[1].split("\n\n")[0]
    assert rule.splitlines()[1:] == ["\t$(GPU_PYTHON) benchmarks/gpu_check.py"]


def test_parts_run_in_their_order(benchmark, tmp_path, capfd):
    seen = tmp_path / "seen"
    parts = [part(benchmark, name, f"open({str(seen)!r}, 'a').write({name!r})") for name in "abc"]
    assert benchmark.main(parts) == 0
    assert seen.read_text() == "abc"
    assert capfd.readouterr().out.endswith("gpu-check: all 3 parts ran through\n")


SLOW = """
import subprocess, sys, time
deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", deaf])
open({pid!r}, "w").write(str(child.pid))
try:
    time.sleep(600)
finally:
    open({kept!r}, "w").write("finished before")
"""


def test_a_part_that_takes_too_long_is_ended_with_all_that_it_started_and_named(
    benchmark, tmp_path, capfd
):
    pid, kept = tmp_path / "pid", tmp_path / "kept"
    slow = part(benchmark, "slow", SLOW.format(pid=str(pid), kept=str(kept)), seconds=8)
    start = time.monotonic()
    assert benchmark.main([slow, part(benchmark, "next", "print('the next one ran')")]) == 1
    assert time.monotonic() - start < 60
    assert kept.read_text() == "finished before"  # it was asked to end first
    with pytest.raises(ProcessLookupError):
        wait_for_the_end_of(int(pid.read_text()))
    out = capfd.readouterr().out
    assert "the next one ran" in out
    assert out.endswith("gpu-check: slow: ended after its 8 seconds; not known: what slow finds\n")


def wait_for_the_end_of(pid: int) -> None:
    """Raises ProcessLookupError when the process is gone."""
    for _ in range(100):
        os.kill(pid, 0)
        if (
            Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] == "Z"
        ):  # ended, and nobody has asked for its status
            raise ProcessLookupError
        time.sleep(0.1)


def test_a_part_that_lacks_packages_is_named_and_does_not_run(benchmark, tmp_path, capfd):
    ran = part(benchmark, "ran", "print('ran')")
    lacks = part(
        benchmark,
        "lacks",
        f"open({str(tmp_path / 'ran')!r}, 'w')",
        needs=("sys", "no_such_package", "nor_this"),
    )
    assert benchmark.main([ran, lacks]) == 0
    out = capfd.readouterr().out
    assert out.endswith(
        "gpu-check: lacks: not run, since this python lacks packages: pip install no_such_package nor_this; "
        "not known: what lacks finds\n"
    )
    assert not (tmp_path / "ran").exists()


def test_nothing_runs_after_a_part_that_fails(benchmark, tmp_path):
    parts = [
        part(benchmark, "bad", "raise SystemExit(7)"),
        part(benchmark, "b", f"open({str(tmp_path / 'ran')!r}, 'w')"),
    ]
    with pytest.raises(
        SystemExit, match=r"gpu-check: bad failed \(exit status 7\); nothing else was run"
    ):
        benchmark.main(parts)
    assert not (tmp_path / "ran").exists()


def test_what_ends_it_ends_the_part_that_runs(benchmark, tmp_path, monkeypatch):
    pid = tmp_path / "pid"
    code = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(600)"

    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(3)
    try:
        with pytest.raises(KeyboardInterrupt):
            benchmark.main([part(benchmark, "long", code)])
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    with pytest.raises(ProcessLookupError):
        wait_for_the_end_of(int(pid.read_text()))
