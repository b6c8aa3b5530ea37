"""Run another tool on packed checkpoints: `python -m rac_modifier lm_eval run --model hf ...`.

lm-eval and lighteval do not import rac_modifier, and then transformers refuses a packed checkpoint.
Arguments, output and exit codes are the tool's (docs/harnesses.md).
"""

import importlib.util
import runpy
import sys


def main() -> None:
    """Run the module that the first argument names, with the other arguments."""
    arguments = sys.argv[1:]
    if not arguments or importlib.util.find_spec(arguments[0]) is None:
        fault = f"{arguments[0]} is not installed" if arguments else "no tool is named"
        sys.exit(
            f"error: {fault}; name lm_eval (pip install 'rac-modifier[harness]') or lighteval "
            "(`make lighteval`, docs/harnesses.md)"
        )
    sys.argv = arguments
    runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
