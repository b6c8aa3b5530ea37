"""lm-eval on packed checkpoints: `python -m rac_modifier.evaluation.lm_eval`.

lm-eval does not import rac_modifier, and then transformers refuses a packed checkpoint. Arguments,
output and exit codes are lm_eval's. docs/harnesses.md has examples.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Run `lm_eval` with this process's arguments; without lm-eval, exit with status 1."""
    try:
        from lm_eval.__main__ import cli_evaluate
    except ModuleNotFoundError as error:
        sys.exit(f"error: {error.name} is not installed; pip install 'rac-modifier[harness]'")
    cli_evaluate()


if __name__ == "__main__":
    main()
