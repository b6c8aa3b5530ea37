"""The command `vllm serve`, and a server of our own: ready, failed, late, killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import urllib.request
from types import SimpleNamespace

import psutil
import pytest

from rac_modifier.errors import RacError
from rac_modifier.sampling.own_server import VllmCommand
from tests.sampling import fake_vllm

HOLDER = """
import signal, sys
from rac_modifier.sampling.own_server import VllmCommand
# a job in the background of a script inherits ignored signals
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
with VllmCommand(sys.argv[1]).serve("m"):
    print("ready", flush=True)
    signal.pause()
"""


@pytest.fixture
def vllm(tmp_path):
    return VllmCommand(str(fake_vllm.install(tmp_path)))


@pytest.mark.parametrize(
    ("version", "options", "added"),
    [
        ("0.32.0+cpu", ("--max-model-len=8192",), True),
        ("0.32.0", (), False),
        ("0.32.0+cpu", ("--enable-chunked-prefill",), False),
    ],
)
def test_a_vllm_for_cpus_reads_prompts_whole(tmp_path, monkeypatch, version, options, added):
    """It would end at the first prompt that it reads in chunks: our requests have seeds."""
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho {version}\n")
    python.chmod(0o700)
    command = VllmCommand(str(tmp_path / "vllm"), options).arguments("model", "auto", 640)[:-1]
    assert ("--no-enable-chunked-prefill" in command) is added
    assert ("--max-model-len 640" in " ".join(command)) is (added and not options)
    assert command[len(command) - len(options) :] == list(options)
    assert ("--gpu-memory-utilization" in command) is version.endswith("+cpu")


@pytest.mark.parametrize(
    ("options", "space", "share"),
    [
        ((), None, "0.40"),
        ((), "2", None),
        (("--gpu-memory-utilization=0.1",), None, None),
        (("--kv-cache-memory-bytes", "9"), None, None),
    ],
)
def test_a_vllm_for_cpus_takes_four_fifths_of_the_free_memory(
    tmp_path, monkeypatch, options, space, share
):
    """It would ask for 92 % of all memory and fail."""
    monkeypatch.setattr(VllmCommand, "version_of", lambda self, package: "0.32.0+cpu")
    monkeypatch.setattr(
        psutil, "virtual_memory", lambda: SimpleNamespace(available=1 << 33, total=1 << 34)
    )
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    if space is not None:
        monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", space)
    command = VllmCommand(str(tmp_path / "vllm"), options).arguments("model", "auto")
    given = command[command.index("--gpu-memory-utilization") + 1] if share else None
    assert given == share
    assert command.count("--gpu-memory-utilization") == (share is not None)


def test_which_vllm(tmp_path):
    path = str(fake_vllm.install(tmp_path))
    assert VllmCommand.from_environment({"PATH": str(tmp_path)}) == VllmCommand(path)
    variables = {"RAC_VLLM": path, "RAC_VLLM_OPTIONS": "--a 1 --b 'x y'", "PATH": "/nowhere"}
    command = VllmCommand(path, ("--a", "1", "--b", "x y"))
    assert VllmCommand.from_environment(variables) == command


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, "no vllm on the PATH; .* name it with RAC_VLLM=/path"),
        ({"RAC_VLLM": "/no/vllm"}, "RAC_VLLM='/no/vllm' is no command; .*name it with"),
        (
            {"RAC_VLLM": "sh", "RAC_VLLM_OPTIONS": "--a 'x", "PATH": "/bin:/usr/bin"},
            r"RAC_VLLM_OPTIONS cannot be read \(No closing quotation\); write",
        ),
    ],
)
def test_wrong_variables_are_named(variables, message):
    with pytest.raises(RacError, match=message):
        VllmCommand.from_environment({"PATH": "/nowhere", **variables})


def test_an_environment_without_our_plugin_is_refused(vllm, tmp_path):
    vllm.check_plugin()  # there is no python next to it to ask
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\n[ "$1" = -I ] && exit 1\n')
    python.chmod(0o755)
    with pytest.raises(RacError, match=r"lacks rac-modifier, .*python -m pip install"):
        vllm.check_plugin()


def test_it_serves_inside_the_context_and_is_gone_after_it(vllm, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/of/this/environment")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    command = VllmCommand(vllm.path, ("--max-model-len", "512"))
    with command.serve("some/model", "float32") as url:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        assert opener.open(f"{url}/health").status == 200
        (start,) = fake_vllm.starts(tmp_path)
        port = url.rpartition(":")[2]
        assert start["argv"] == [
            "serve", "some/model", "--host", "127.0.0.1", "--dtype", "float32",
            "--max-model-len", "512", "--port", port,
        ]  # fmt: skip
        assert "PYTHONPATH" not in start["variables"]  # it is another environment
        assert start["variables"]["VLLM_NO_USAGE_STATS"] == "1"
    assert fake_vllm.left_over(tmp_path) == []


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (
            "crash",
            r"\Avllm serve stopped with exit code 1; its options .* are set in RAC_VLLM_OPTIONS. "
            r"Its first error:\nERROR 12-03 \[core.py:953\] RuntimeError: no memory\n"
            r"Its last lines:\nloading part 130\n(.|\n)*ValueError: the KV cache does not fit\Z",
        ),
        ("silent", r"exit code 7; .* It printed nothing\Z"),
    ],
)
def test_a_failed_start_shows_its_last_lines(vllm, monkeypatch, fault, words):
    monkeypatch.setenv(fake_vllm.FAULT, fault)
    with pytest.raises(RacError, match=words), vllm.serve("m"):
        pass


@pytest.mark.parametrize(
    ("cores", "options", "own", "bound"),
    [
        ({3, 0}, (), None, "0,3"),
        ({3, 0}, ("--max-model-len=64",), None, "0,3"),
        ({3, 0}, (), "3", "3"),
        ({3, 0}, ("--tensor-parallel-size", "2"), None, None),
        (set(range(5)), (), None, None),
    ],
)
def test_on_few_cores_the_server_has_all_of_them(
    vllm, tmp_path, monkeypatch, cores, options, own, bound
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: cores)
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    if own is not None:
        monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", own)
    with VllmCommand(vllm.path, options).serve("m"):
        (start,) = fake_vllm.starts(tmp_path)
    assert start["variables"].get("VLLM_CPU_OMP_THREADS_BIND") == bound


def test_a_start_that_takes_too_long_is_ended(vllm, tmp_path, monkeypatch):
    monkeypatch.setenv(fake_vllm.FAULT, "never")
    pipe = fake_vllm.pipe_of_starts(tmp_path)
    monkeypatch.setattr(
        "rac_modifier.sampling.own_server._is_healthy", lambda port: os.read(pipe, 1) == b""
    )
    late = VllmCommand(vllm.path, timeout=0.0)
    message = r"not ready after 0 s\. Its last lines:\nstill loading\Z"
    with pytest.raises(RacError, match=message), late.serve("m"):
        pass
    assert fake_vllm.left_over(tmp_path) == []


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_no_process_is_left_when_ours_ends_by_a_signal(vllm, tmp_path, monkeypatch, number, early):
    """Once it is ready, and while it still loads."""
    if early:
        monkeypatch.setenv(fake_vllm.FAULT, "never")
    pipe = fake_vllm.pipe_of_starts(tmp_path)
    command = [sys.executable, "-c", HOLDER, vllm.path]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    os.read(pipe, 1)
    if not early:
        assert holder.stdout.readline() == b"ready\n"
    holder.send_signal(number)
    holder.wait()
    assert fake_vllm.left_over(tmp_path) == []
