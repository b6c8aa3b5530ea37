"""Programs in processes that are forks of one that has imported what they need."""

import os
import signal
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from tests.fork_server import fork_server


class Done(NamedTuple):
    """A program that has ended."""

    returncode: int
    stdout: str
    stderr: str


def start(main, words, folder, errors, variables=None, output=Path(os.devnull)):
    """Call `main`, a function of a module, with these words on its command line, in `folder` and in
    a session of its own.

    What it says on standard error goes to `errors`, a file or a terminal, and what it
    prints to `output`.
    """
    arguments = (main, list(words), str(folder), dict(variables or {}), str(output), str(errors))
    process = fork_server().Process(target=_child, args=arguments)
    process.start()
    return process


def run(main, words, folder, variables=None):
    """The same until it ends. Its output is kept in `folder`.out and `folder`.err."""
    output, errors = folder.with_name(f"{folder.name}.out"), folder.with_name(f"{folder.name}.err")
    process = start(main, words, folder, errors, variables, output)
    try:
        process.join()
    finally:
        process.kill()
    return Done(process.exitcode, output.read_text(), errors.read_text())


def _child(main, words, folder, variables, output, errors):
    os.setsid()
    os.chdir(folder)
    os.environ.update(variables)
    for stream, path in ((1, output), (2, errors)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOCTTY, 0o644), stream)
    # A job in the background of a script, such as a CI run, inherits an ignored SIGINT:
    # Python then raises no KeyboardInterrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    sys.argv = [main.__module__, *words]
    main()
