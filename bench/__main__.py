"""`python -m bench SUITE [...]` runs a suite of benchmarks; `--list` names them."""

import argparse
import importlib
import shlex
import sys

from bench.common import add_common

SUITES = (
    "accuracy",
    "formats",
    "activation_sparsity",
    "steps",
    "schemes",
    "experts",
    "time",
    "kernels",
    "serving",
    "token",
    "runtimes",
    "recovery",
    "stopping",
    "tasks",
    "traces",
    "scale",
)


def main(arguments: list[str]) -> int:
    """Run a suite; return the exit status."""
    if arguments[:1] == ["--list"]:
        for name in SUITES:
            summary = (importlib.import_module(f"bench.{name}").__doc__ or "").partition("\n")[0]
            print(f"{name:20} {summary}")
        return 0
    if not arguments or arguments[0] not in SUITES:
        print(f"usage: python -m bench SUITE [options]; --list explains {', '.join(SUITES)}")
        return 2
    suite = importlib.import_module(f"bench.{arguments[0]}")
    parser = argparse.ArgumentParser(
        prog=f"python -m bench {arguments[0]}",
        description=suite.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_common(parser)
    suite.add_options(parser)
    if "--tiny" in arguments:  # explicit options win over the tiny mode's
        parser.set_defaults(**vars(parser.parse_args(shlex.split(suite.TINY))))
    suite.run(parser.parse_args(arguments[1:]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
