"""lm-eval's command, in a process in which transformers loads packed checkpoints: `python -m rac_modifier.evaluation.lm_eval`.

lm-eval itself does not import rac_modifier, and then transformers refuses a packed checkpoint. Arguments, output and exit codes
are those of `lm_eval`. docs/harnesses.md has examples.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Run `lm_eval` with the arguments of this process. Without lm-eval: one line on standard error and exit code 1."""
    try:
        from lm_eval.__main__ import cli_evaluate
    except ModuleNotFoundError as error:
        print(
            f"error: {error.name} is not installed; pip install 'rac-modifier[harness]'",
            file=sys.stderr,
        )
        sys.exit(1)
    cli_evaluate()


if __name__ == "__main__":
    main()
