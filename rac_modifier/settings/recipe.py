"""Read, change and check a recipe before llm-compressor gets it: the entry of one of our modifiers, whichever it has."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from rac_modifier.errors import RacError
from rac_modifier.llmcompressor.calibrating_modifier import CalibratingModifier
from rac_modifier.llmcompressor.calibration_modifier import ReasoningAwareCalibrationModifier
from rac_modifier.llmcompressor.pruning_modifier import ReasoningAwareSparseGPTModifier

NAME = "ReasoningAwareSparseGPTModifier"
MODIFIERS: dict[str, type[CalibratingModifier]] = {
    NAME: ReasoningAwareSparseGPTModifier,
    "ReasoningAwareCalibrationModifier": ReasoningAwareCalibrationModifier,
}


def load_recipe(path: Path, overrides: list[str] | None = None) -> dict[str, Any]:
    """The recipe's content with `key.sub=value` overrides applied to our modifier's entry, checked.

    Raises:
        RacError: no such file, not YAML, a layout in which llm-compressor would find no modifier, an entry that our
            modifier refuses, or an override that is not `key=value`.
    """
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RacError(f"no recipe at {path}; the repository's recipes/ folder has some to start from") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RacError(f"recipe {path} cannot be read ({error}); name a YAML file") from error
    except yaml.YAMLError as error:
        raise RacError(f"{path} is not YAML: {error}") from error
    recipe = copy.deepcopy(recipe)
    name, entry = find_named_entry(recipe, str(path))
    for override in overrides or []:
        _apply(entry, override)
    check_entry(entry, str(path), name)
    return recipe


def find_entry(recipe: Any, where: str) -> dict[str, Any]:
    """The settings of `find_named_entry` alone."""
    return find_named_entry(recipe, where)[1]


def find_named_entry(recipe: Any, where: str) -> tuple[str, dict[str, Any]]:
    """Name and settings of our modifier inside a recipe, the settings to read or to change in place.

    llm-compressor reads `<stage>_stage: <group>_modifiers: <Modifier>: {...}` and silently runs a recipe without any
    modifier when those suffixes are missing; that is refused here.
    """

    def layout(name: str = NAME) -> str:
        return f"write it as pruning_stage: pruning_modifiers: {name}: {{...}}"

    if not isinstance(recipe, dict):
        raise RacError(f"{where} holds no recipe but {type(recipe).__name__}; {layout()}")
    for stage, groups in recipe.items():
        if not isinstance(groups, dict):
            continue
        for group, modifiers in groups.items():
            name = next((name for name in MODIFIERS if isinstance(modifiers, dict) and name in modifiers), None)
            if name is None:
                continue
            if not (str(stage).endswith("_stage") and str(group).endswith("_modifiers")):
                raise RacError(f"{where}: llm-compressor would overlook {stage}: {group}: {name}; {layout(name)}")
            modifiers[name] = {} if modifiers[name] is None else modifiers[name]
            if not isinstance(modifiers[name], dict):
                raise RacError(f"{where}: {name} holds {modifiers[name]!r}, not settings; {layout(name)}")
            return name, modifiers[name]
    raise RacError(f"{where} has no {' or '.join(MODIFIERS)}; {layout()}")


def check_entry(entry: dict[str, Any], where: str, name: str = NAME) -> CalibratingModifier:
    """Validate the settings of our modifier of this name; every problem in one message."""
    try:
        return MODIFIERS[name](**entry)
    except ValidationError as error:
        raise RacError(f"{where}: {describe_errors(error)}") from error


def describe_errors(error: ValidationError) -> str:
    """Pydantic's findings as `key.sub: what is wrong`, one a line."""
    lines = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            message = f"there is no such setting (value {item['input']!r}); see `rac schema`"
        elif item["type"] != "value_error":
            message = f"{message} (value {item['input']!r})"
        lines.append(f"{key}: {message}" if key else message)
    return "\n".join(lines)


def schema(name: str = NAME) -> str:
    """The JSON Schema of a recipe entry of our modifier of this name.

    Raises:
        RacError: a modifier that is not ours.
    """
    if name not in MODIFIERS:
        raise RacError(f"{name!r} is none of this package's modifiers; name one of {', '.join(MODIFIERS)}")
    return json.dumps(MODIFIERS[name].model_json_schema(), indent=2) + "\n"


def _apply(entry: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise RacError(f"--set {override!r} is not key=value, for example --set calibration.tokens=32768")
    *parents, last = key.split(".")
    for parent in parents:
        entry = entry.setdefault(parent, {})
        if not isinstance(entry, dict):
            raise RacError(f"--set {override!r}: {parent} is not a group of settings")
    try:
        entry[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise RacError(f"--set {override!r}: the value is not YAML ({error})") from error
