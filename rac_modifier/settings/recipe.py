"""Read, change and check a recipe before llm-compressor reads it, and our entry in it."""

import json
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from rac_modifier.errors import RacError
from rac_modifier.settings.check import check_settings
from rac_modifier.settings.entries import ENTRIES, CalibrationEntry
from rac_modifier.settings.recipe_files import find_recipe, parse_yaml, read_yaml

NAME = "ReasoningAwareSparseGPTModifier"
# Of llm-compressor 0.14; tests/contracts/test_recipes.py compares them with its registry.
_NAMES = (
    "AWQ AutoRound ConstantPruning GPTQ LogarithmicEqualization MagnitudePruning QuIP Quantization "
    "REAPPruning SmoothQuant SparseGPT SpinQuant WandaPruning"
)
MODIFIERS = ENTRIES.keys() | {f"{name}Modifier" for name in _NAMES.split()}
_LAYOUT = f"write it as pruning_stage: pruning_modifiers: {NAME}: {{...}}"


def load_recipe(named: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Return a recipe's content, checked, with `key.sub=value` overrides applied (RacError).

    `named` is a path or a shipped recipe. Neither recipe nor override can name code.
    """
    recipe = read_recipe(named)
    name, entry = find_named_entry(recipe, str(named))
    apply_overrides(entry, overrides)
    check_entry(entry, str(named), name)
    return dict(recipe)


def read_recipe(named: str | Path) -> Any:
    """Return what a recipe holds, unchecked; a text of several lines is the recipe itself."""
    if "\n" in str(named):
        return parse_yaml(str(named), "recipe")
    return read_yaml(find_recipe(named), "recipe", "name a YAML file")


def _groups_of(recipe: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """Yield "stage: group" with its modifiers; None where llm-compressor overlooks them.

    It reads `<stage>_stage: <group>_modifiers: <Modifier>: {...}`, and runs a recipe without those
    suffixes without the modifier and without a message.
    """
    for stage, groups in recipe.items():
        if stage == "args":
            continue
        if not isinstance(groups, dict) or not groups:
            yield str(stage), None
            continue
        for group, modifiers in groups.items():
            is_read = str(stage).endswith("_stage") and str(group).endswith("_modifiers")
            is_read = is_read and isinstance(modifiers, dict) and bool(modifiers)
            yield f"{stage}: {group}", modifiers if is_read else None


def modifiers_of(recipe: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return name and settings of each modifier of a recipe, in its order."""
    return [item for _, modifiers in _groups_of(recipe) for item in (modifiers or {}).items()]


def find_named_entry(recipe: Any, where: str) -> tuple[str, dict[str, Any]]:
    """Return name and settings, to be changed in place, of our one modifier inside a recipe."""
    check_layout(recipe, where)
    entries = [(name, settings) for name, settings in modifiers_of(recipe) if name in ENTRIES]
    if len(entries) > 1:
        names = " and ".join(sorted(name for name, _ in entries))
        raise RacError(f"{where} has {names}; leave one out: one calibrates the whole recipe")
    if not entries:
        raise RacError(f"{where} has no {' or '.join(ENTRIES)}; {_LAYOUT}")
    return entries[0]


def check_layout(recipe: Any, where: str) -> None:
    """Refuse a recipe of which llm-compressor would overlook a part; add settings left empty."""
    if not isinstance(recipe, dict):
        problem = "is empty" if recipe is None else f"holds no recipe but {type(recipe).__name__}"
        raise RacError(f"{where} {problem}; {_LAYOUT}")
    for group, modifiers in _groups_of(recipe):
        if modifiers is None:
            raise RacError(f"{where}: llm-compressor would overlook {group}; {_LAYOUT}")
        for name, settings in modifiers.items():
            if name not in MODIFIERS:
                close = get_close_matches(str(name), MODIFIERS, 1, 0.6)
                known = f"did you mean {close[0]}?" if close else f"it has {sorted(MODIFIERS)}"
                raise RacError(
                    f"{where}, {group}: llm-compressor has no modifier {name!r}; {known}"
                )
            if not isinstance(settings, dict | None):
                raise RacError(f"{where}: {name} holds {settings!r}, not settings; {_LAYOUT}")
            modifiers[name] = settings or {}


def check_entry(entry: dict[str, Any], where: str, name: str = NAME) -> CalibrationEntry:
    """Validate the settings of our modifier of this name (RacError: all mistakes)."""
    return check_settings(ENTRIES[name], entry, where)


def schema(name: str = NAME) -> str:
    """Return the JSON Schema of our modifier of this name (RacError: not our modifier)."""
    if name not in ENTRIES:
        raise RacError(f"{name!r} is none of our modifiers; name one of {', '.join(ENTRIES)}")
    return json.dumps(ENTRIES[name].model_json_schema(), indent=2) + "\n"


def apply_overrides(entry: dict[str, Any], overrides: Sequence[str]) -> None:
    """Set each `key.sub=value` in place."""
    set_values(entry, dict(map(_read_override, overrides)))


def set_values(entry: dict[str, Any], changes: dict[tuple[str, ...], Any]) -> None:
    """Set values of an entry in place; None takes a setting out (RacError: below no group)."""
    for path, value in changes.items():
        group: Any = entry
        for parent in path[:-1]:
            if group.get(parent) is None:
                group[parent] = {}
            group = group[parent]
            if not isinstance(group, dict):
                raise RacError(f"{'.'.join(path)}: {parent} is not a group of settings")
        if value is None:
            group.pop(path[-1], None)
        else:
            group[path[-1]] = value


def _read_override(override: str) -> tuple[tuple[str, ...], Any]:
    """Return path and value of `key.sub=value`."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RacError(f"--set {override!r} is not key=value, as in calibration.tokens=32768")
    value = parse_yaml(text, f"--set {override[:100]!r}: the value is not YAML")
    return tuple(key.split(".")), value
