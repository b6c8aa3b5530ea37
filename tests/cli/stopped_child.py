"""A run of `rac` that waits for Ctrl-C at a certain moment."""

import os
import signal
from typing import Any

from rac_modifier import cli


def main() -> None:
    """`rac`. When a file whose path ends in STOP_AT has been put in place, wait there, and make the
    file "stopped"."""
    end, replace = os.environ["STOP_AT"], os.replace

    def replace_and_wait(source: Any, target: Any) -> None:
        replace(source, target)
        if str(target).endswith(end):
            with open("stopped", "w") as file:
                file.write("\n" * 3)
            signal.pause()

    os.replace = replace_and_wait  # type: ignore[assignment]
    if end == "recovery.safetensors":
        from rac_modifier.recovery import training_loop

        training_loop._SAVE_SECONDS = 0.0
    cli.main()


def killed() -> None:
    """`rac`, which kills itself when a file whose path ends in KILL_AT has been put in place."""
    end, replace = os.environ["KILL_AT"], os.replace

    def replace_and_die(source: Any, target: Any) -> None:
        replace(source, target)
        if str(target).endswith(end):
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = replace_and_die  # type: ignore[assignment]
    cli.main()
