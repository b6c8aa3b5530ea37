"""A run of `rac` in a forked process; importing this imports what such a run needs, so that a fork server has it already."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from rac_modifier import cli
from rac_modifier.cli import options  # noqa: F401 - imported for the fork server, as the next ones
from rac_modifier.evaluation import accuracy, calibrated_prompt, report, results  # noqa: F401
from rac_modifier.problems import held_out  # noqa: F401
from rac_modifier.sampling import openai_server, own_server  # noqa: F401


def run(arguments: Sequence[str], folder: str, variables: dict[str, str]) -> None:
    """The command in a folder of its own; its output goes to a file there."""
    os.chdir(folder)
    os.environ.update(variables)
    with open("output.txt", "a") as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
    sys.argv = ["rac", *arguments]
    cli.main()
