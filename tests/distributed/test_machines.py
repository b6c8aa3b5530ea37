"""`rac prune` and `rac recover` on two machines without a shared folder, and what they refuse."""

import contextlib
import os
import shutil
import socket
import threading
from pathlib import Path

import psutil
import pytest
import torch

from rac_modifier import RacError, cli
from rac_modifier.distributed import machines
from tests.checkpoint.checkpoint_helpers import dense_tensors
from tests.cli.conftest import OPTIONS
from tests.forked import run
from tests.llmcompressor.test_resume import result
from tests.machines import differ, lose_a_connection, rac, two_machines
from tests.started import started_forks
from tests.tiny import entry, recipe

PRUNE = ["prune", "model", "out", "--recipe", "recipe.yaml"]
RECOVER = ["recover", "model", "out", "recovered", *OPTIONS]
RECOVER += ["--set", "tokens=1000", "--set", "learning_rate=0.0003"]


def errors(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("error:")]


@pytest.mark.slow
def test_two_machines_end_as_one_and_go_on_after_one_has_died(tiny_folder, trace_store, tmp_path):
    """Pruning has the bits of one process, and recovery of two on one machine.

    The machine that dies closes no connection.
    """
    alone, first, second = (tmp_path / name for name in ("alone", "first", "second"))
    calibration = {"tokens": 1500, "batch_tokens": 128, "held_out_tokens": 100}
    for folder in (alone, first, second):
        folder.mkdir()
    for folder in (alone, first):
        shutil.copytree(tiny_folder, folder / "model")
        shutil.copy(trace_store, folder / "store.jsonl")
        settings = entry(Path("store.jsonl"), calibration=calibration)
        (folder / "recipe.yaml").write_text(recipe(settings))
    with contextlib.ExitStack() as stack:
        try:
            pair = stack.enter_context(two_machines((first, second)))
        except OSError as error:
            pytest.skip(f"no namespaces of users and networks here: {error}")
        pair[1].do(f"cp -r {alone}/model {alone}/recipe.yaml {second}")
        (code, said), _ = rac(pair, ["dies-1", *PRUNE], tmp_path / "dies", silence=2)
        assert code == 1, said
        (line,) = errors(said)
        assert "another of the 2 processes has ended or does not answer" in line
        assert len(list((first / "out.unfinished").glob("group-*"))) == 2
        pair[1].do("ip link set veth1 up")
        for words in (PRUNE, RECOVER):
            pair[1].do(f"test ! -e {second}/out")
            ends = rac(pair, words, tmp_path / words[0])
            assert [code for code, _ in ends] == [0, 0], ends
    assert not list(second.iterdir())  # its files were its own
    for words, count in ((PRUNE, 1), (RECOVER, 2)):
        ends = started_forks(cli.main, words, alone, count)
        assert [code for code, _ in ends] == [0] * count, ends
    (record, actual), (expected, weights) = (result(folder / "out") for folder in (first, alone))
    assert actual == weights
    assert record.pop("processes") == 2
    assert record == expected
    recovered, again = (dense_tensors(folder / "recovered") for folder in (first, alone))
    assert recovered.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in recovered.items())
    before = dense_tensors(first / "out")
    assert any(not torch.equal(tensor, before[name]) for name, tensor in recovered.items())


def differences(difference: str, words: list[str], folder: Path) -> set[str]:
    """The errors of two processes. The second differs, and both must end with exit code 1."""
    ends = started_forks(differ, [difference, *words], folder)
    assert [code for code, _ in ends] == [1, 1], ends
    return {line for _, said in ends for line in errors(said)}


def test_another_version_or_clock_is_refused_before_anything_is_read(tmp_path):
    words = ["prune", "no model", "out", "--recipe", "no recipe"]
    (line,) = differences("torch", words, tmp_path)
    assert f"process 1 on {socket.gethostname()} has another torch than process 0 on" in line
    assert f"(0.1, not {torch.__version__}): make them the same" in line
    (line,) = differences("clock", words, tmp_path)
    assert f"the clock of process 1 on {socket.gethostname()} differs by +3,600 s" in line


@pytest.mark.slow
def test_another_model_is_refused_before_anything_is_sampled(tiny_folder, tmp_path):
    (tmp_path / "recipe.yaml").write_text(recipe(entry()))
    prune = ["prune", str(tiny_folder), "out", "--recipe", "recipe.yaml"]
    recover = ["recover", str(tiny_folder), str(tiny_folder), "out"]
    for difference, words in (("model", prune), ("dense model", recover)):
        (line,) = differences(difference, words, tmp_path)
        assert f"process 1 on {socket.gethostname()} has another {difference} than" in line
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_a_process_that_computes_ends_when_a_connection_is_lost(tmp_path):
    end = run(lose_a_connection, [], tmp_path)
    assert (end.returncode, end.stderr) == (1, "error: the other machine has ended\n")


def test_gloo_uses_the_interface_that_leads_to_the_first_machine(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "of a user")
    machines.choose_interface("127.0.0.1", 29400)
    assert os.environ["GLOO_SOCKET_IFNAME"] == "of a user"
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    machines.choose_interface("127.0.0.1", 29400)
    addresses = psutil.net_if_addrs()[os.environ["GLOO_SOCKET_IFNAME"]]
    assert "127.0.0.1" in {address.address for address in addresses}


GARBAGE = {
    "random": lambda peer: peer.sendall(b"\xa7\x03\x91\x5c" * 99),
    "half a message": lambda peer: peer.sendall(b"\0\0"),
    "silence": lambda peer: None,
    "a flood": lambda peer: [peer.sendall(bytes(1 << 20)) for _ in range(1 << 20)],
    "closed": socket.socket.close,
}


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize("send", GARBAGE.values(), ids=GARBAGE)
def test_garbage_at_the_port_is_refused(monkeypatch, send, rank):
    """The second process connects to a stranger; the first gets strangers for the second."""
    monkeypatch.setattr(machines, "_JOIN", 0.2)
    before, over, peers = set(threading.enumerate()), threading.Event(), []
    server = socket.create_server(("127.0.0.1", 0))
    host, port = server.getsockname()
    place = {"MASTER_ADDR": host, "MASTER_PORT": str(port), "RANK": rank, "WORLD_SIZE": "2"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    if rank == "0":
        server.close()

    def strangers() -> None:
        while not over.is_set() and len(peers) < 9:
            with contextlib.suppress(OSError):  # refused, or ended by the process
                connect = rank == "0"
                peers.append(socket.create_connection((host, port)) if connect else accept())
                send(peers[-1])

    def accept() -> socket.socket:
        return server.accept()[0]

    threading.Thread(target=strangers).start()
    try:
        with pytest.raises(RacError):
            machines.connect()
    finally:
        over.set()
        with contextlib.suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)  # which ends `accept`
        for peer in peers:
            with contextlib.suppress(OSError):
                peer.shutdown(socket.SHUT_RDWR)
            peer.close()
        for thread in set(threading.enumerate()) - before:
            thread.join()
        server.close()
    assert peers
