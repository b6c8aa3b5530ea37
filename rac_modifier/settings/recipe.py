"""Read, change and check a recipe before llm-compressor reads it: the entry of the one of our modifiers that it has."""

from __future__ import annotations

import json
import re
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from rac_modifier.errors import RacError
from rac_modifier.settings.check import check_settings
from rac_modifier.settings.entries import ENTRIES, CalibrationEntry
from rac_modifier.settings.shipped_recipes import find_recipe
from rac_modifier.settings.strict_yaml import parse_yaml, read_yaml

NAME = "ReasoningAwareSparseGPTModifier"


def load_recipe(named: str | Path, overrides: list[str] | None = None) -> dict[str, Any]:
    """The recipe's content with `key.sub=value` overrides applied to our modifier's entry, checked.

    `named` is a path, or the name of a recipe that ships with the package.

    Neither the recipe nor an override can name code: YAML is read with the safe loader, and no setting imports anything.

    Raises:
        RacError: no such recipe, not YAML, a layout in which llm-compressor finds no modifier, an entry with settings that
            cannot work, or an override that is not `key=value`.
    """
    recipe = read_recipe(named)
    name, entry = find_named_entry(recipe, str(named))
    apply_overrides(entry, overrides or [])
    check_entry(entry, str(named), name)
    return recipe


def read_recipe(named: str | Path) -> Any:
    """What a recipe's file holds, unchecked; `named` is a path, or the name of a recipe that ships with the package.

    Raises:
        RacError: no such recipe, or not YAML.
    """
    return read_yaml(find_recipe(named), "recipe", "name a YAML file")


def find_named_entry(recipe: Any, where: str) -> tuple[str, dict[str, Any]]:
    """Name and settings of our modifier inside a recipe, the settings to read or to change in place.

    llm-compressor reads `<stage>_stage: <group>_modifiers: <Modifier>: {...}`. Where those suffixes are missing it runs
    the recipe without any modifier and without a message; that is refused here.

    Raises:
        RacError: another layout, none of our modifiers, or more than one.
    """

    def layout(name: str = NAME) -> str:
        return f"write it as pruning_stage: pruning_modifiers: {name}: {{...}}"

    if not isinstance(recipe, dict):
        what = "is empty" if recipe is None else f"holds no recipe but {type(recipe).__name__}"
        raise RacError(f"{where} {what}; {layout()}")
    found: list[tuple[str, dict[str, Any]]] = []
    others: list[str] = []
    for stage, groups in recipe.items():
        for group, modifiers in groups.items() if isinstance(groups, dict) else ():
            others += map(str, modifiers) if isinstance(modifiers, dict) else []
            for name in ENTRIES.keys() & modifiers.keys() if isinstance(modifiers, dict) else ():
                if not (str(stage).endswith("_stage") and str(group).endswith("_modifiers")):
                    raise RacError(
                        f"{where}: llm-compressor would overlook {stage}: {group}: {name}; {layout(name)}"
                    )
                modifiers[name] = {} if modifiers[name] is None else modifiers[name]
                if not isinstance(modifiers[name], dict):
                    raise RacError(
                        f"{where}: {name} holds {modifiers[name]!r}, not settings; {layout(name)}"
                    )
                found.append((name, modifiers[name]))
    if not found:
        misspelt = [
            (other, ours)
            for other in others
            for ours in get_close_matches(other, ENTRIES, n=1, cutoff=0.9)
        ]
        next_step = (
            "{} is no modifier; did you mean {}?".format(*misspelt[0]) if misspelt else layout()
        )
        raise RacError(f"{where} has no {' or '.join(ENTRIES)}; {next_step}")
    if len(found) > 1:
        names = " and ".join(sorted(name for name, _ in found))
        raise RacError(
            f"{where} has {names}; leave one of them out: one calibrates the whole recipe"
        )
    return found[0]


def has_entry(recipe: Any) -> bool:
    """Whether one of our modifiers is anywhere in a recipe."""
    if not isinstance(recipe, dict):
        return False
    return bool(ENTRIES.keys() & recipe.keys()) or any(map(has_entry, recipe.values()))


def check_layout(recipe: Any, where: str) -> None:
    """Refuse a recipe, without an entry of ours, that llm-compressor would overlook (RacError)."""
    stages = recipe.items() if isinstance(recipe, dict) else [("", None)]
    for stage, groups in stages:
        names = groups if isinstance(groups, dict) else {"": None}
        if not str(stage).endswith("_stage") or not all(
            str(name).endswith("_modifiers") for name in names
        ):
            raise RacError(
                f"{where}: llm-compressor would overlook {stage or recipe!r}; write it as quantization_stage: "
                "quantization_modifiers: QuantizationModifier: {...}"
            )


def check_entry(entry: dict[str, Any], where: str, name: str = NAME) -> CalibrationEntry:
    """Validate the settings of our modifier of this name.

    Raises:
        RacError: with every mistake in one message.
    """
    return check_settings(ENTRIES[name], entry, where)


def schema(name: str = NAME) -> str:
    """The JSON Schema of a recipe entry of our modifier of this name.

    Raises:
        RacError: a modifier that is not ours.
    """
    if name not in ENTRIES:
        raise RacError(
            f"{name!r} is none of this package's modifiers; name one of {', '.join(ENTRIES)}"
        )
    return json.dumps(ENTRIES[name].model_json_schema(), indent=2) + "\n"


def apply_overrides(entry: dict[str, Any], overrides: list[str]) -> None:
    """Change settings in place, each written as `key.sub=value`.

    Raises:
        RacError: an override that is not `key=value`.
    """
    for override in overrides:
        _apply(entry, override)


def _apply(entry: dict[str, Any], override: str) -> None:
    """Set one value of an entry; `null` takes the setting out, whatever the recipe holds there."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RacError(
            f"--set {override!r} is not key=value, for example --set calibration.tokens=32768"
        )
    # YAML would read 2:4 as the number 124
    is_ratio = re.fullmatch(r"[0-9]+:[0-9]+", text)
    value = text if is_ratio else parse_yaml(text, f"--set {override!r}: the value is not YAML")
    *parents, last = key.split(".")
    for parent in parents:
        if entry.get(parent) is None:
            entry[parent] = {}
        entry = entry[parent]
        if not isinstance(entry, dict):
            raise RacError(f"--set {override!r}: {parent} is not a group of settings")
    if value is None:
        entry.pop(last, None)
    else:
        entry[last] = value
