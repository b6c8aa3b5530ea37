"""Train the embedded reasoner from scratch, on a CPU, and write it into the package.

    python training/train_reasoner.py --out rac_modifier/reasoner/assets

Deterministic: the tokenizer, the weights' initial values and every batch follow from
`--seed` and the step number, the schedule counts steps and not minutes, so the same machine
gives the same model. Resumable: the state is written to `--work` every `--save-every` steps
and picked up again; a resumed run equals an uninterrupted one bit by bit.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from reasoner_training import train

from rac_modifier.runtime.cpu_tuning import keep_freed_memory


def main() -> None:
    keep_freed_memory()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished model")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("build/reasoner"),
        help="folder of the run's state and log",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1700)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens a step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument(
        "--stop-after", type=int, default=None, help="stop at this step, to go on later"
    )
    parser.add_argument(
        "--no-compile", dest="compile", action="store_false", help="skip torch.compile"
    )
    train(parser.parse_args())


if __name__ == "__main__":
    main()
