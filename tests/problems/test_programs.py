"""Programs that do what they should not: they are ended, and nothing of them is left."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from rac_modifier.errors import RacError
from rac_modifier.problems import programs
from rac_modifier.problems.programs import Limits, describe_runner, examine_runner, run_program

if sys.platform != "linux":
    pytest.skip("programs are confined on Linux only", allow_module_level=True)

SHORT = Limits(seconds=1)


@pytest.fixture(scope="module")
def holds() -> dict[str, bool]:
    return examine_runner()


@pytest.fixture
def calls_confined(holds: dict[str, bool]) -> None:
    if not holds["system_calls"]:
        pytest.skip("this machine filters no system calls")


@pytest.fixture
def files_confined(holds: dict[str, bool]) -> None:
    if not holds["files"]:
        pytest.skip("this machine has no Landlock")


def attempts(*lines: str, **limits: int) -> list[str]:
    """What each line prints, or the name of the error that it raises."""
    tries = "".join(
        f"try:\n    {line}\nexcept BaseException as error:\n    print(type(error).__name__)\n"
        for line in lines
    )
    outcome = run_program(
        f"import os, socket, subprocess, threading\n{tries}", "", Limits(**limits)
    )
    assert outcome.end == "finished"
    return outcome.output.split()


def left(marker: str) -> list[str]:
    """Processes that have a text in their command line."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            try:
                line = (folder / "cmdline").read_bytes()
            except OSError:
                continue
            found += [folder.name] if marker.encode() in line else []
    return found


def test_a_program_reads_its_input_and_prints() -> None:
    outcome = run_program("n = int(input())\nprint(n * 2)\nprint('é')", "21\n")
    assert (outcome.end, outcome.output) == ("finished", "42\né\n")
    assert run_program("import sys; print(1); sys.exit(3)", "").end == "failed"
    assert run_program("print(", "").end == "failed"
    assert run_program("import torch", "").end == "failed", "the standard library and nothing else"


def test_it_has_no_environment_and_a_folder_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAC_SECRET", "key")
    outcome = run_program(
        "import os, sys\nprint(os.environ.get('RAC_SECRET'), os.listdir('.'), os.getcwd(), sys.argv[1:])",
        "",
    )
    secret, listed, folder, _ = outcome.output.split()
    assert (secret, listed) == ("None", "['program.py']")
    assert folder.startswith(os.path.join(tempfile.gettempdir(), "rac-program-"))
    assert not Path(folder).exists()


def test_an_endless_loop_ends_by_its_processor_time_and_a_sleeper_by_the_clock(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert run_program("while True: pass", "", SHORT).end == "time"
    monkeypatch.setattr(programs, "_WALL_FACTOR", 0)
    monkeypatch.setattr(programs, "_WALL_MORE", 1)
    outcome = run_program("import time\nprint('before', flush=True)\ntime.sleep(600)", "", SHORT)
    assert (outcome.end, outcome.output) == ("time", "before\n")
    assert left("rac-program-") == []


def test_a_fork_bomb_is_held(calls_confined: None) -> None:
    bomb = (
        "import os\ncount = 0\nwhile True:\n    try:\n        os.fork()\n        count += 1\n"
        "    except OSError:\n        break\nprint(count)"
    )
    outcome = run_program(bomb, "", SHORT)
    assert (outcome.end, outcome.output) == ("finished", "0\n")
    assert left("rac-program-") == []


def test_no_other_process_no_network_no_signal_and_threads(calls_confined: None) -> None:
    victim = subprocess.Popen([sys.executable, "-I", "-S", "-c", "input()"], stdin=subprocess.PIPE)
    try:
        found = attempts(
            "subprocess.run(['/bin/echo', 'x'])",
            "socket.create_connection(('127.0.0.1', 9))",
            "socket.socketpair()",
            f"os.kill({victim.pid}, 9)",
            "os.setsid()",
            "os.chmod('.', 0o777)",
            "os.utime('.')",
            "thread = threading.Thread(target=print, args=('thread',)); thread.start(); thread.join()",
        )
        assert found == ["PermissionError"] * 7 + ["thread"]
        assert victim.poll() is None
    finally:
        victim.communicate(b"\n")


def test_files_are_written_in_its_folder_only_and_read_where_python_is(
    files_confined: None, tmp_path: Path
) -> None:
    (tmp_path / "secret").write_text("key")
    found = attempts(
        "open('own.txt', 'w').write('1'); print(open('own.txt').read())",
        f"open({str(tmp_path / 'new')!r}, 'w')",
        f"print(open({str(tmp_path / 'secret')!r}).read())",
        f"os.remove({str(tmp_path / 'secret')!r})",
        f"os.rename('own.txt', {str(tmp_path / 'moved')!r})",
        "print(open('/proc/self/environ').read())",
        f"print(len(open({os.__file__!r}).read()) > 0)",
    )
    assert found[0] == "1"
    assert found[1:6] == ["PermissionError"] * 5
    assert found[6] == "True"
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]


def test_a_memory_hog_a_flood_and_a_large_file_are_ended() -> None:
    little = {"memory": 300 * 2**20, "file": 3 * 2**20, "output": 2**20}
    assert attempts("print(len(bytearray(10**9)))", "print('goes on')", **little) == [
        "MemoryError",
        "goes",
        "on",
    ]
    flood = run_program("while True: print('x' * 1000)", "", Limits(**little))
    assert flood.end == "output"
    assert len(flood.output) == 2**20
    found = attempts(
        "file = open('big', 'wb', 0); [file.write(bytes(2**20)) for _ in range(9)]", **little
    )
    assert found == ["OSError"]


def test_limits_cannot_be_raised() -> None:
    found = attempts(
        "import resource; resource.setrlimit(resource.RLIMIT_CPU, (99, 99))",
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (2**40, 2**40))",
        "import resource; print(resource.getrlimit(resource.RLIMIT_CPU)[1])",
    )
    assert found == ["ValueError", "ValueError", "6"]


def test_what_is_run_ends_with_the_process_that_runs_it(tmp_path: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parents[2])!r})\n"
        "from rac_modifier.problems.programs import run_program\n"
        "run_program('import time\\ntime.sleep(600)', '')"
    )
    runner = subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "TMPDIR": str(tmp_path)}
    )
    try:
        deadline = time.monotonic() + 60
        while not left(str(tmp_path)):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.5)  # past the lines that ask for the signal
        runner.kill()
        runner.wait()
        while left(str(tmp_path)):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        runner.kill()


def test_the_report_says_what_holds_and_what_does_not(holds: dict[str, bool]) -> None:
    assert holds["system_calls"] == (platform.machine() == "x86_64")
    assert "NOT CONFINED" not in describe_runner({"files": True, "system_calls": True})
    text = describe_runner({"files": True, "system_calls": False})
    assert text.endswith(
        "NOT CONFINED here: no new processes, no network, no signals, no change of rights of files."
    )


def test_another_system_and_a_python_that_does_not_start_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(programs, "_python", lambda: "/no/python")
    examine_runner.cache_clear()
    with pytest.raises(RacError, match="/no/python cannot be started"):
        examine_runner()
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(RacError, match="confined on Linux only, and this is darwin"):
        examine_runner()
    examine_runner.cache_clear()
