"""Arguments, options and output that several commands share."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

Model = Annotated[
    str,
    typer.Argument(help='a model folder, a Hugging Face id, or "reasoner" for the embedded one'),
]
Recipe = Annotated[
    Path,
    typer.Option(
        "--recipe",
        "-r",
        help="a file, or the name of a shipped recipe, such as rac_2of4 (see: rac recipes)",
    ),
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
    typer.Option(metavar="DTYPE", help="auto (as stored), bfloat16, float16 or float32"),
]
Sequences = Annotated[
    int, typer.Option(min=1, help="samples of the model, or traces of its store, to measure on")
]
Source = Annotated[
    str,
    typer.Option(
        help="of problems: arithmetic (held out), reasoning-gym:TASK, a file or a dataset id"
    ),
]
Column = Annotated[str | None, typer.Option(help="column of the question (file or dataset)")]
Cap = Annotated[int, typer.Option(min=1, help="most new tokens of a sample")]
BatchSize = Annotated[int, typer.Option(min=1, help="samples generated together")]
Seed = Annotated[int, typer.Option(help="seed of problems and sampling")]
SAMPLING = (
    "source",
    "column",
    "cap",
    "batch_size",
    "seed",
)  # what of these has no effect on stored traces
AsJson = Annotated[
    bool, typer.Option("--json", help="print JSON on standard output, and nothing else there")
]


def print_json(obj: Any) -> None:
    """One JSON object on standard output; paths become text, and NaN is refused."""
    typer.echo(json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False, default=str))
