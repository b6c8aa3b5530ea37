"""`rac prune`: a recipe applied to a model, saved as a sparse checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rac_modifier.cli.models import check_model, check_output, resolve, unpacked
from rac_modifier.cli.options import Dtype, Model, Overrides, Precision, PresetName, Recipe


def prune(
    model: Model,
    output: Annotated[Path, typer.Argument(help="folder for the sparse checkpoint; new or empty")],
    recipe: Recipe,
    preset: Annotated[
        PresetName | None,
        typer.Option(
            help="in place of the recipe's: quality (the default), fast, or paper for the RAC paper's own way"
        ),
    ] = None,
    set_: Overrides = None,
    precision: Precision = Dtype.AUTO,
) -> None:
    """Prune or quantize a model as a recipe says, and save it.

    Samples the model's own chains of thought (or reads them from a store), calibrates on them and
    prunes layer by layer: llm-compressor's oneshot, with recipe and output folder checked first.

    Example: rac prune reasoner reasoner-2of4 --recipe recipes/rac_2of4.yaml --set calibration.tokens=32768
    """
    import yaml

    import rac_modifier  # noqa: F401 - registers the modifier
    from rac_modifier.settings.recipe import load_recipe

    content = load_recipe(recipe, [*(set_ or []), *([f"preset={preset}"] if preset else [])])
    source = resolve(model)
    check_model(source)
    check_output(output, source)
    from llmcompressor import oneshot

    oneshot(
        model=unpacked(source, precision),
        recipe=yaml.safe_dump(content, sort_keys=False),
        precision=precision.value,
        output_dir=str(output),
    )
    typer.echo(f"saved to {output}; look at it with: rac inspect {output}")
