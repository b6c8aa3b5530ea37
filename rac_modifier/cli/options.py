"""Arguments and options that several commands share."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(help='a model folder, a Hugging Face id, or "reasoner" for the embedded one')]
Recipe = Annotated[
    Path,
    typer.Option("--recipe", "-r", help="a file, or the name of a shipped recipe, such as rac_2of4 (see: rac recipes)"),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        "-s",
        help="change one setting of the recipe, e.g. --set calibration.tokens=32768; null takes it out (repeatable)",
    ),
]


class Dtype(StrEnum):
    """What `--precision` takes."""

    AUTO = "auto"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


class PresetName(StrEnum):
    """What `--preset` takes."""

    QUALITY = "quality"
    FAST = "fast"
    PAPER = "paper"


Precision = Annotated[
    Dtype,
    typer.Option(help="dtype of the weights (auto: as stored); float32 is faster on a CPU without bfloat16 units"),
]
