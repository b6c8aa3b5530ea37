"""Two machines on this one: network namespaces with a veth pair between them.

The second has mounts of its own: the folder of the first and its shared memory are hidden there,
and its own folder is hidden from the first.
"""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from rac_modifier import cli
from rac_modifier.distributed import machines
from rac_modifier.llmcompressor import pruning_modifier
from rac_modifier.llmcompressor.run import Run
from rac_modifier.recovery import checkpoint
from tests import forked
from tests.llmcompressor.several_processes import at

ADDRESSES = ("10.77.0.1", "10.77.0.2")


class Machine:
    """A shell that holds the namespaces of a machine."""

    def __init__(self, folder: Path, command: Sequence[str]):
        self.folder = folder
        pipe = subprocess.PIPE
        self.shell = subprocess.Popen(
            [*command, "sh", "-e"], stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, text=True
        )

    def do(self, *commands: str) -> None:
        """Run commands in the machine (OSError: one failed, with what it said)."""
        try:
            self.shell.stdin.write("\n".join([*commands, "echo done", ""]))
            self.shell.stdin.flush()
        except BrokenPipeError:
            pass
        said = []
        for line in self.shell.stdout:
            if line == "done\n":
                return
            said.append(line.strip())
        raise OSError(" ".join(said))


@contextlib.contextmanager
def two_machines(folders: Sequence[Path]) -> Iterator[list[Machine]]:
    """Yield two connected machines, each with its folder (OSError: not permitted)."""
    pair: list[Machine] = []
    try:
        pair.append(Machine(folders[0], ["unshare", "-rnm"]))
        pair[0].do("true")
        user = ["nsenter", "-t", str(pair[0].shell.pid), "-U", "--preserve-credentials"]
        pair.append(Machine(folders[1], [*user, "unshare", "-nm"]))
        pair[1].do("true")
        pair[0].do(f"ip link add veth0 type veth peer name veth1 netns {pair[1].shell.pid}")
        for number, machine in enumerate(pair):
            device = f"veth{number}"
            machine.do("ip link set lo up", f"ip addr add {ADDRESSES[number]}/24 dev {device}")
            machine.do(f"ip link set {device} up")
        for hidden in ("/dev/shm", *folders):
            pair[1].do(f"mount -t tmpfs none {hidden}")
        yield pair
    finally:
        for machine in pair:
            machine.shell.kill()
            machine.shell.communicate()


def rac(
    pair: Sequence[Machine], words: Sequence[str], errors: Path, silence: float = 25
) -> list[tuple[int | None, str]]:
    """Start `rac` on both machines as torchrun does; return exit codes and standard errors.

    A process that has not ended after a minute of another's end has no exit code.
    """
    processes, paths = [], []
    for number, machine in enumerate(pair):
        variables = {
            "MACHINE": str(number),
            "HOLDER": str(machine.shell.pid),
            "FOLDER": str(machine.folder),
            "SILENCE": str(silence),
            "OMP_NUM_THREADS": "1",
        }
        paths.append(errors.with_name(f"{errors.name}.{number}"))
        process = forked.start(main, words, errors.parent, paths[-1], variables)
        processes.append(process)
    try:
        wait([process.sentinel for process in processes])
        for process in processes:
            process.join(60)
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    ends = zip(processes, paths, strict=True)
    return [(process.exitcode, path.read_text()) for process, path in ends]


def main() -> None:
    """Run torchrun's agent in a machine, and in it one process of `rac`."""
    holder = os.environ["HOLDER"]
    libc = ctypes.CDLL(None, use_errno=True)
    spaces = [os.open(f"/proc/{holder}/ns/{kind}", os.O_RDONLY) for kind in ("user", "net", "mnt")]
    for space in spaces:
        if libc.setns(space, 0):
            raise OSError(ctypes.get_errno(), "setns")
    os.chdir(os.environ["FOLDER"])
    number = int(os.environ["MACHINE"])
    config = LaunchConfig(
        min_nodes=2,
        max_nodes=2,
        nproc_per_node=1,
        run_id="run",
        rdzv_backend="c10d",
        rdzv_endpoint=f"{ADDRESSES[0]}:29400",
        rdzv_configs={"is_host": str(number == 0)},
        local_addr=ADDRESSES[number],
        max_restarts=0,
        start_method="fork",
    )
    elastic_launch(config, work)(*sys.argv[1:])


def work(*words: str) -> None:
    """Run `rac` with these words; after "dies-1" the second machine dies on the way."""
    torch.set_num_threads(1)  # a fork makes its thread pool anew, and no two threads may do it
    machines._SILENCE = int(os.environ["SILENCE"])
    if words[0].startswith("dies"):
        if words[0].endswith(os.environ["MACHINE"]):
            at(Run, "solve_on_all_ranks", 3, lose_power)()
        words = words[1:]
    sys.argv = ["rac", *words]
    cli.main()


def lose_power(*_: Any) -> None:
    """End as a machine without power: no connection is closed, all processes are gone."""
    subprocess.run(["ip", "link", "set", f"veth{os.environ['MACHINE']}", "down"], check=True)
    os.killpg(os.getpgrp(), signal.SIGKILL)


# What the second process has otherwise than the first.
DIFFERENCES: dict[str, tuple[Any, str, Any]] = {
    "torch": (machines, "environment", lambda: {"torch": "0.1"}),
    "clock": (time, "time", lambda now=time.time: now() + 3600),
    "model": (pruning_modifier, "model_fingerprint", lambda model: "another"),
    "dense model": (checkpoint, "model_fingerprint", lambda model: "another"),
}


def differ() -> None:
    """DIFFERENCE WORDS: run `rac`, in the second process with this difference."""
    difference, *words = sys.argv[1:]
    if os.environ["RANK"] == "1":
        setattr(*DIFFERENCES[difference])
    sys.argv = ["rac", *words]
    cli.main()


def lose_a_connection() -> None:
    """Compute for a minute, or until the watch of a connection that is lost ends this process."""
    machines._GRACE = 0.0
    before = machines.open_sockets()
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = socket.create_connection(server.getsockname())
        theirs, _ = server.accept()
    machines.Watch(before, lambda: "the other machine has ended").start()
    theirs.shutdown(socket.SHUT_RDWR)
    time.sleep(60)
    ours.close()
