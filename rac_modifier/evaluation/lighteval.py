"""lighteval's command, in a process that loads packed checkpoints: `python -m rac_modifier.evaluation.lighteval`.

lighteval itself does not import rac_modifier, and then transformers refuses a packed checkpoint. Arguments, output and exit codes
are those of `lighteval`, which needs an environment of its own (docs/harnesses.md).
"""

from __future__ import annotations

import sys


def main() -> None:
    """Run `lighteval` with the arguments of this process. Without lighteval: one line on standard error and exit code 1."""
    try:
        from lighteval.__main__ import app
    except ModuleNotFoundError as error:
        print(
            f"error: {error.name} is not installed; lighteval needs an environment of its own (`make lighteval`, "
            "docs/harnesses.md)",
            file=sys.stderr,
        )
        sys.exit(1)
    app()


if __name__ == "__main__":
    main()
