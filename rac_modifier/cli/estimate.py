"""`rac estimate`: what pruning a model by a recipe will cost, without loading its weights."""

from __future__ import annotations

from typing import Any

import typer

from rac_modifier.cli.models import check_model, resolve
from rac_modifier.cli.options import Model, Overrides, PresetName, Recipe
from rac_modifier.errors import RacError


def estimate(model: Model, recipe: Recipe, set_: Overrides = None) -> None:
    """Say what each preset costs on a model with a recipe's budget, counted in multiply-adds; no weights are loaded.

    What the recipe itself sets wins over a preset, as in rac prune. Attention and the sampling of traces are not counted.

    Example: rac estimate reasoner --recipe recipes/rac_2of4.yaml
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from rac_modifier.llmcompressor.targets import find_targets
    from rac_modifier.pruning.cost import groups_by_input
    from rac_modifier.settings.recipe import NAME, check_entry, find_named_entry, load_recipe

    name, entry = find_named_entry(load_recipe(recipe, set_), str(recipe))
    if name != NAME:
        raise RacError(f"{recipe}: {name} prunes nothing, so no cost is counted; name a recipe with {NAME}")
    source = resolve(model)
    check_model(source)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source))
    settings: Any = check_entry(entry, str(recipe))
    groups = groups_by_input(empty, find_targets(empty, settings.targets, settings.ignore, settings.pattern))
    weights = sum(group.weights for group in groups)
    modules = sum(len(group.rows) for group in groups)
    tokens = settings.calibration.tokens
    typer.echo(f"{model}: {weights / 1e9:.3g} billion weights in {modules} modules to prune, {tokens:,} tokens\n")
    rows: list[tuple[str, ...]] = [("preset", "multiply-adds", "a billion weights", *_PARTS)]
    for preset in PresetName:
        chosen: Any = check_entry({**entry, "preset": preset.value}, str(recipe))
        rows.append((preset.value, *_cells(chosen.cost(groups), weights)))
    for row in rows:
        typer.echo("  ".join(cell.ljust(7) if i == 0 else cell.rjust(17) for i, cell in enumerate(row)))


_PARTS = ("forward passes", "second moments", "solver", "options")


def _cells(cost: Any, weights: int) -> list[str]:
    parts = (cost.forward, cost.second_moments, cost.solver, cost.options)
    return [f"{cost.total:.2e}", f"{cost.total / weights * 1e9:.2e}", *(f"{part / cost.total:.0%}" for part in parts)]
