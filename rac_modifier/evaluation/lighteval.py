"""lighteval on packed checkpoints: `python -m rac_modifier.evaluation.lighteval`.

lighteval does not import rac_modifier, and then transformers refuses a packed checkpoint.
Arguments, output and exit codes are lighteval's, which needs an environment of its own
(docs/harnesses.md).
"""

from __future__ import annotations

import sys


def main() -> None:
    """Run `lighteval` with this process's arguments; without lighteval, exit with status 1."""
    try:
        from lighteval.__main__ import app
    except ModuleNotFoundError as error:
        sys.exit(
            f"error: {error.name} is not installed; lighteval needs an environment of its own "
            "(`make lighteval`, docs/harnesses.md)"
        )
    app()


if __name__ == "__main__":
    main()
