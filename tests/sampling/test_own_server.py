"""A server of our own: ready, failed, late, killed; with a fake `vllm` that notes its processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import urllib.request

import pytest

from rac_modifier.errors import RacError
from rac_modifier.sampling.own_server import ServerOnDemand, last_lines, vllm_server
from rac_modifier.sampling.vllm_command import VllmCommand
from tests.sampling import fake_vllm

HOLDER = """
import signal, sys, time
from rac_modifier.sampling.own_server import vllm_server
from rac_modifier.sampling.vllm_command import VllmCommand
# a job in the background of a script inherits ignored signals
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
with vllm_server(VllmCommand(sys.argv[1]), "m"):
    print("ready", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def vllm(tmp_path):
    return VllmCommand(str(fake_vllm.install(tmp_path)), timeout=60)


def test_it_serves_inside_the_context_and_is_gone_after_it(vllm, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/of/this/environment")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    command = VllmCommand(vllm.path, ("--max-model-len", "512"), 60)
    with vllm_server(command, "some/model", "float32") as url:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        assert opener.open(f"{url}/health").status == 200
        (start,) = fake_vllm.starts(tmp_path)
        port = url.rpartition(":")[2]
        assert start["argv"] == [
            "serve", "some/model", "--host", "127.0.0.1", "--port", port, "--dtype", "float32", "--max-model-len", "512",
        ]  # fmt: skip
        assert "PYTHONPATH" not in start["variables"]  # it is another environment
        assert start["variables"]["VLLM_NO_USAGE_STATS"] == "1"
    assert fake_vllm.left_over(tmp_path) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), ValueError("body")])
def test_an_exception_stops_it_and_passes(vllm, tmp_path, error):
    with pytest.raises(type(error)), vllm_server(vllm, "m"):
        raise error
    assert fake_vllm.left_over(tmp_path) == []


def test_an_error_of_the_body_stays_as_it_is_while_the_server_runs(vllm):
    with pytest.raises(RacError, match=r"\Aa problem of ours\Z"), vllm_server(vllm, "m"):
        raise RacError("a problem of ours")


def use_a_server_that_is_killed(vllm, folder):
    with vllm_server(vllm, "m"):
        (start,) = fake_vllm.starts(folder)
        os.kill(start["pid"], signal.SIGKILL)
        assert fake_vllm.until(lambda: not fake_vllm.is_running(start["watcher"]))
        raise RacError("no answer")


def test_a_server_that_died_is_named_in_the_error_of_the_body(vllm, tmp_path):
    with pytest.raises(RacError, match=r"no answer\. vllm serve stopped with exit code 137"):
        use_a_server_that_is_killed(vllm, tmp_path)


def test_a_failed_start_shows_the_last_lines(vllm, monkeypatch):
    monkeypatch.setenv(fake_vllm.FAULT, "crash")
    with pytest.raises(RacError) as caught, vllm_server(vllm, "m"):
        pass
    text = str(caught.value)
    assert text.startswith(
        "vllm serve stopped with exit code 1; its options (such as --max-model-len 8192) are set in"
    )
    assert "RAC_VLLM_OPTIONS. Its last lines:\n" in text
    assert text.endswith("loading part 38\nloading part 39\nValueError: the KV cache does not fit")
    assert "loading part 3\n" not in text


def test_a_failed_start_shows_the_first_error_where_the_last_lines_do_not(vllm, monkeypatch):
    monkeypatch.setenv(fake_vllm.FAULT, "crash of a worker")
    with pytest.raises(RacError) as caught, vllm_server(vllm, "m"):
        pass
    text = str(caught.value)
    cause = "(Worker pid=7) ERROR 11-26 [executor.py:953] ValueError: no memory on node 0"
    assert (
        f"RAC_VLLM_OPTIONS. Its first error:\n{cause}\nIts last lines:\n  File part16.py\n" in text
    )
    assert text.endswith("RuntimeError: Engine core initialization failed. See root cause above.")


def test_a_failed_start_without_a_word(vllm, monkeypatch):
    monkeypatch.setenv(fake_vllm.FAULT, "silent")
    with (
        pytest.raises(RacError, match=r"exit code 7; .* It printed nothing\Z"),
        vllm_server(vllm, "m"),
    ):
        pass


def test_a_start_that_takes_too_long_is_ended(vllm, tmp_path, monkeypatch):
    monkeypatch.setenv(fake_vllm.FAULT, "never")

    def not_yet(port):
        assert fake_vllm.until(lambda: fake_vllm.starts(tmp_path) != [])
        return False

    monkeypatch.setattr("rac_modifier.sampling.own_server._is_healthy", not_yet)
    late = VllmCommand(vllm.path, timeout=0.01)
    message = r"not ready after 0\.01 s\. Its last lines:\nstill loading\Z"
    with pytest.raises(RacError, match=message), vllm_server(late, "m"):
        pass
    assert fake_vllm.left_over(tmp_path) == []


def test_a_command_that_cannot_be_started_is_an_error(tmp_path):
    (tmp_path / "vllm").write_text("#!/no/such/python\n")
    (tmp_path / "vllm").chmod(0o755)
    with (
        pytest.raises(RacError, match="vllm serve stopped with exit code 1"),
        vllm_server(VllmCommand(str(tmp_path / "vllm")), "m"),
    ):
        pass


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("early", [False, True])
def test_no_process_is_left_when_ours_ends_by_a_signal(vllm, tmp_path, monkeypatch, number, early):
    """Once it is ready, and while it still loads."""
    if early:
        monkeypatch.setenv(fake_vllm.FAULT, "never")
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, vllm.path], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert fake_vllm.until(lambda: fake_vllm.starts(tmp_path) != [])
    if not early:
        assert holder.stdout.readline() == b"ready\n"
    holder.send_signal(number)
    holder.wait(30)
    assert fake_vllm.left_over(tmp_path) == []


def test_last_lines_of_a_long_log_with_bytes_that_are_no_text(tmp_path):
    with (tmp_path / "log").open("w+b") as log:
        assert last_lines(log, 3) == []
        log.write(b"".join(b"line %d\n\n" % i for i in range(9000)) + b"\xff\r\nend")
        log.flush()
        assert last_lines(log, 3) == ["line 8999", "\ufffd", "end"]
        log.write(b"!")  # still at the end
        log.flush()
        assert last_lines(log, 1) == ["end!"]


def test_a_server_on_demand_starts_once_when_it_is_asked(vllm, tmp_path):
    with ServerOnDemand(lambda: vllm_server(vllm, "m")) as server:
        assert fake_vllm.starts(tmp_path) == []
        with server.asked() as first:
            pass
        with server.asked() as second:
            assert second == first
        assert len(fake_vllm.starts(tmp_path)) == 1
    assert fake_vllm.left_over(tmp_path) == []


def test_a_server_on_demand_that_died_is_named_and_started_again(vllm, tmp_path):
    def ask_and_kill(server):
        with server.asked():
            start = fake_vllm.starts(tmp_path)[-1]
            os.kill(start["pid"], signal.SIGKILL)
            assert fake_vllm.until(lambda: not fake_vllm.is_running(start["watcher"]))
            raise RacError("no answer")

    with ServerOnDemand(lambda: vllm_server(vllm, "m")) as server:
        with pytest.raises(RacError, match=r"no answer\. vllm serve stopped with exit code 137"):
            ask_and_kill(server)
        with server.asked() as (url,):
            assert urllib.request.urlopen(f"{url}/health").status == 200
    assert len(fake_vllm.starts(tmp_path)) == 2
    assert fake_vllm.left_over(tmp_path) == []
