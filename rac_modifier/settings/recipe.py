"""Read, change and check a recipe before llm-compressor reads it, and our entry in it."""

import json
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Self

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
_DEEPEST = 8  # parts of a key; no setting has as many


class CheckedRecipe:
    """A recipe that llm-compressor reads whole: stages of groups of modifiers, by name.

    It reads `<stage>_stage: <group>_modifiers: <Modifier>: {...}`, and runs a recipe without those
    suffixes without the modifier and without a message; such a recipe is refused here.
    """

    def __init__(self, content: Any, where: str):
        """Check the layout (RacError: not this one); messages call the recipe `where`.

        Settings left empty become {}.
        """
        if not isinstance(content, dict):
            problem = "is empty" if content is None else f"holds no recipe but {content!r:.80}"
            raise RacError(f"{where} {problem}; {_LAYOUT}")
        self.content: dict[str, Any] = content
        self.where = where
        for group, modifiers in self._groups():
            wrong = None if modifiers else f"llm-compressor would overlook {group}; {_LAYOUT}"
            for name, settings in (modifiers or {}).items():
                if name not in MODIFIERS:
                    close = get_close_matches(str(name), MODIFIERS, 1, 0.6)
                    known = f"did you mean {close[0]}?" if close else f"it has {sorted(MODIFIERS)}"
                    wrong = f"{group}: llm-compressor has no modifier {name!r}; {known}"
                elif not isinstance(settings, dict | None):
                    wrong = f"{name} holds {settings!r:.80}, not settings; {_LAYOUT}"
            if modifiers is None or wrong is not None:
                raise RacError(f"{where}: {wrong}")
            modifiers.update({name: settings or {} for name, settings in modifiers.items()})

    @classmethod
    def read(cls, named: str | Path) -> Self:
        """Read a file, a shipped recipe, or a text of several lines; its layout is checked."""
        if "\n" in str(named):
            return cls(parse_yaml(str(named), "recipe"), "recipe")
        return cls(read_yaml(find_recipe(named), "recipe", "name a YAML file"), str(named))

    @classmethod
    def load(cls, named: str | Path, overrides: Sequence[str] = ()) -> Self:
        """Read a recipe, apply `key.sub=value` overrides, and check our entry (RacError).

        A key that begins with the name of another modifier, such as GPTQModifier.scheme, is set
        there. Neither recipe nor override can name code.
        """
        recipe = cls.read(named)
        changes: dict[str, Any] = {}
        modifiers = dict(recipe.modifiers)
        _, entry = recipe.entry
        for key, value in map(_read_override, overrides):
            modifier, _, setting = key.partition(".")
            if modifier not in MODIFIERS:
                changes[key] = value
            elif modifier in modifiers and setting:
                set_values(modifiers[modifier], {setting: value})
            else:
                raise RacError(
                    f"--set {key}: write MODIFIER.setting=value with a modifier of {named}: "
                    f"{', '.join(modifiers)}"
                )
        set_values(entry, changes)
        recipe.check()
        return recipe

    def _groups(self) -> Iterator[tuple[str, dict[str, Any] | None]]:
        """Yield "stage: group" with its modifiers; None where llm-compressor overlooks them."""
        for stage, groups in self.content.items():
            if stage == "args":
                continue
            if not isinstance(groups, dict) or not groups:
                yield str(stage), None
                continue
            for group, modifiers in groups.items():
                is_read = str(stage).endswith("_stage") and str(group).endswith("_modifiers")
                is_read = is_read and isinstance(modifiers, dict) and bool(modifiers)
                yield f"{stage}: {group}", modifiers if is_read else None

    @property
    def modifiers(self) -> list[tuple[str, dict[str, Any]]]:
        """Return name and settings of each modifier, in their order."""
        return [item for _, modifiers in self._groups() for item in (modifiers or {}).items()]

    @property
    def entry(self) -> tuple[str, dict[str, Any]]:
        """Return name and settings, to be changed in place, of our modifier (RacError: not one)."""
        entries = [(name, settings) for name, settings in self.modifiers if name in ENTRIES]
        if len(entries) != 1:
            names = " and ".join(sorted(name for name, _ in entries))
            raise RacError(
                f"{self.where} has {names}; leave one out: one calibrates the whole recipe"
                if entries
                else f"{self.where} has no {' or '.join(ENTRIES)}; {_LAYOUT}"
            )
        return entries[0]

    def check(self) -> CalibrationEntry:
        """Return the settings of our modifier (RacError: all mistakes)."""
        name, entry = self.entry
        return check_settings(ENTRIES[name], entry, self.where)


def schema(name: str = NAME) -> str:
    """Return the JSON Schema of our modifier of this name (RacError: not our modifier)."""
    if name not in ENTRIES:
        raise RacError(f"{name!r} is none of our modifiers; name one of {', '.join(ENTRIES)}")
    return json.dumps(ENTRIES[name].model_json_schema(), indent=2) + "\n"


def set_values(entry: dict[str, Any], changes: Mapping[str, Any] | Sequence[str]) -> None:
    """Set values in place by `key.sub`, also written `key.sub=value`; None takes a setting out."""
    if not isinstance(changes, Mapping):
        changes = dict(map(_read_override, changes))
    for key, value in changes.items():
        *parents, last = key.split(".")
        group: Any = entry
        for parent in parents:
            if group.get(parent) is None:
                group[parent] = {}
            group = group[parent]
            if not isinstance(group, dict):
                raise RacError(f"{key}: {parent} is not a group of settings")
        if value is None:
            group.pop(last, None)
        else:
            group[last] = value


def _read_override(override: str) -> tuple[str, Any]:
    """Return key and value of `key.sub=value`."""
    key, equals, text = override.partition("=")
    if not equals or not key or key.count(".") >= _DEEPEST:
        raise RacError(f"--set {override[:100]!r} is not key=value, as in calibration.tokens=32768")
    return key, parse_yaml(text, f"--set {override[:100]!r}: the value is not YAML")
