"""A run of training/train_reasoner.py in a fork; forked.py starts it."""

import runpy
import sys
from pathlib import Path

TRAINING = Path(__file__).parents[2] / "training" / "train_reasoner.py"


def main() -> None:
    """The script with the words of the command line."""
    sys.path.insert(0, str(TRAINING.parent))
    runpy.run_path(str(TRAINING), run_name="__main__")
