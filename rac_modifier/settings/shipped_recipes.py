"""The recipes that ship with the package, in `rac_modifier/recipes/`. They are named without a path: rac_2of4, for example."""

from __future__ import annotations

import difflib
from pathlib import Path

from rac_modifier.errors import RacError

FOLDER = Path(__file__).parents[1] / "recipes"
_SUFFIX = ".yaml"


def recipe_names() -> list[str]:
    """The names of all shipped recipes, sorted."""
    return sorted(path.stem for path in FOLDER.glob(f"*{_SUFFIX}"))


def recipe(name: str) -> str:
    """The path of a shipped recipe, as llm-compressor's `oneshot` takes it.

    oneshot("path/or/id", recipe=rac_modifier.recipe("rac_2of4"), output_dir="out")

    Raises:
        RacError: no recipe of this name; with the names that are close.
    """
    if name not in recipe_names():
        raise RacError(f"no recipe is named {name!r}; {_suggestion(name)}")
    return str(FOLDER / f"{name}{_SUFFIX}")


def find_recipe(named: str | Path) -> Path:
    """The file that a user named: an existing file, or else the shipped recipe of this name.

    Raises:
        RacError: neither; with the names that are close.
    """
    path = Path(named)
    if path.is_file():
        return path
    if str(named) in recipe_names():
        return FOLDER / f"{named}{_SUFFIX}"
    if not path.exists():
        raise RacError(f"no recipe at {named}; {_suggestion(path.stem)}")
    return path


def summary(name: str) -> str:
    """What a shipped recipe does, in one line: the first comment of its file."""
    return (
        Path(recipe(name)).read_text(encoding="utf-8").partition("\n")[0].removeprefix("#").strip()
    )


def _suggestion(name: str) -> str:
    close = difflib.get_close_matches(name, recipe_names(), n=3, cutoff=0.5)
    meant = f"did you mean {' or '.join(close)}? Or " if close else ""
    return f"{meant}name a YAML file, or one of the recipes that `rac recipes` lists"
