"""Hooks of mkdocs.yml: pages of the site that are rendered from the code.

A page contains one of the comments below, and gets the rendered text in its place. So it is
never older than the code.

    <!-- settings: NAME -->    every setting of the recipe entry NAME, from its pydantic model
    <!-- left-out: NAME -->    the settings of the pruning entry that the entry NAME does not have
    <!-- recipes -->           every shipped recipe: its comment, and its text
    <!-- commands -->          every command of `rac`: its help, its arguments and options
"""

from __future__ import annotations

import html
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from mkdocs.config.defaults import MkDocsConfig
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from rac_modifier.cli import app
from rac_modifier.settings.entries import ENTRIES

Place = tuple[str, ...]
"""Where a setting is: ("traces", "sampling")."""
PRUNING = "ReasoningAwareSparseGPTModifier"
ROOT = Path(__file__).parents[1]
RECIPES = next(
    folder for folder in (ROOT / "rac_modifier" / "recipes", ROOT / "recipes") if folder.is_dir()
)
_COMMENT = re.compile(r"^<!-- (settings|left-out|recipes|commands)(?:: (\w+))? -->$", re.MULTILINE)
_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
_NAMES = {
    "str": "text",
    "int": "integer",
    "float": "number",
    "bool": "true or false",
    "Any": "anything",
}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Leave out the entries of nav whose page is not there."""
    config.nav = [_existing(entry, Path(config.docs_dir)) for entry in config.nav or []]
    return config


def _existing(section: dict[str, Any], folder: Path) -> dict[str, Any]:
    return {
        title: [page for page in pages if all((folder / path).is_file() for path in page.values())]
        for title, pages in section.items()
    }


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the rendered text in the place of each comment."""
    return _COMMENT.sub(lambda match: render(match[1], match[2]), markdown)


def render(kind: str, name: str | None) -> str:
    """The text for one comment of a page."""
    if kind == "recipes":
        return "\n\n".join(render_recipe(path) for path in sorted(RECIPES.glob("*.yaml")))
    if kind == "commands":
        return "\n".join(render_command(typer.main.get_command(app), "rac"))
    entry = ENTRIES[str(name)]
    if kind == "left-out":
        return ", ".join(f"`{'.'.join(path)}`" for path in left_out(ENTRIES[PRUNING], entry))
    return "\n".join(render_settings(entry, (), {}))


def render_recipe(path: Path) -> str:
    """A heading with the recipe's name, the comment at its top, and the rest of its text."""
    lines = path.read_text(encoding="utf-8").splitlines()
    first = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    about = " ".join(line.removeprefix("#").strip() for line in lines[:first])
    return "\n".join([f"## {path.stem}", "", _escaped(about), "", "```yaml", *lines[first:], "```"])


def render_command(command: Any, name: str) -> Iterator[str]:
    """Yield a command's heading, help and parameters; groups yield their commands."""
    if hasattr(command, "commands"):
        for child, inner in command.commands.items():
            yield from render_command(inner, f"{name} {child}")
        return
    anchor = name.replace(" ", "-")
    yield from [f"## {name} {{ #help-{anchor} }}", "", _escaped(command.help or ""), ""]
    for parameter in command.params:
        option = parameter.param_type_name == "option"
        names = parameter.opts if option else [str(parameter.metavar or parameter.name).upper()]
        yield f"`{', '.join(names)}`"
        yield f":   {_escaped(getattr(parameter, 'help', None) or 'see above')}"
        yield ""


def left_out(first: type[BaseModel], second: type[BaseModel], path: Place = ()) -> list[Place]:
    """Where settings of `first` are that `second` does not have."""
    missing: list[Place] = []
    for name in first.model_fields:
        if name not in second.model_fields:
            missing.append((*path, name))
            continue
        ours, theirs = (_group(model.model_fields[name].annotation)[0] for model in (first, second))
        if ours is not None and theirs is not None and ours is not theirs:
            missing += left_out(ours, theirs, (*path, name))
    return missing


def render_settings(
    model: type[BaseModel], path: Place, seen: dict[type[BaseModel], Place]
) -> Iterator[str]:
    """Yield a model's settings as definitions; then, each under a heading, its groups.

    `seen` holds where each group is described already: the same group elsewhere gets a link to it.
    """
    groups: list[type[BaseModel]] = []
    for name, field in model.model_fields.items():
        if not field.description:
            raise ValueError(
                f"{'.'.join((*path, name))}: this setting has no description; add one to its Field"
            )
        inner, by_name = _group(field.annotation)
        if inner is not None and inner not in seen:
            seen[inner] = (*path, name, "NAME") if by_name else (*path, name)
            groups.append(inner)
        anchor = "" if inner in groups else f"#{_anchor((*path, name))} "
        yield f"`{name}`{{ {anchor}.setting }} {_type(field)}{_default(field)}"
        link = (
            f". Its settings: [{'.'.join(seen[inner])}](#{_anchor(seen[inner])})" if inner else ""
        )
        yield f":   {_escaped(field.description)}{link}"
        yield ""
    for inner in groups:
        yield from [f"## {'.'.join(seen[inner])} {{ #{_anchor(seen[inner])} }}", ""]
        yield from render_settings(inner, seen[inner], seen)


def _anchor(path: Place) -> str:
    return "-".join(path).lower()


def _escaped(text: str) -> str:
    return re.sub(r"([*_`\[\]])", r"\\\1", html.escape(text, quote=False))


def _group(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    """The settings class in an annotation, and whether it is the value of a mapping by name."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, False
    for part in typing.get_args(annotation):
        inner, _ = _group(part)
        if inner is not None:
            return inner, typing.get_origin(annotation) is dict
    return None, False


def _type(field: FieldInfo) -> str:
    bounds = [
        f"{words} {value:,}"
        for rule in field.metadata
        for key, words in _BOUNDS.items()
        if (value := getattr(rule, key, None)) is not None
    ]
    return ", ".join([_words(field.annotation), *bounds])


def _words(annotation: Any) -> str:
    """A type in words: "integer", "one of `a`, `b`", "list of text"."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _words(arguments[0])
    if origin is typing.Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(
            dict.fromkeys(_words(part) for part in arguments if part is not type(None))
        )
    if origin in (list, tuple):
        inner = list(dict.fromkeys(_words(part) for part in arguments if part is not Ellipsis))
        kind = "pair" if origin is tuple and Ellipsis not in arguments else "list"
        return f"{kind} of {_plural(inner[0])}"
    if origin is dict:
        key = "name" if arguments[0] is str else _words(arguments[0])
        return f"mapping from {key} to {_words(arguments[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "group of settings"
    if origin is not None or (callable(annotation) and not isinstance(annotation, type)):
        return "Python function"
    return (
        _NAMES[annotation.__name__]
        if isinstance(annotation, type)
        else _NAMES[str(annotation).split(".")[-1]]
    )


def _plural(word: str) -> str:
    return word if word == "text" else f"{word}s"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return ", required"
    value = (
        field.default
        if field.default is not PydanticUndefined
        else field.get_default(call_default_factory=True)
    )
    if value is None:
        return ", optional"
    if isinstance(value, BaseModel) or value in ({}, []):
        return ""
    if isinstance(value, dict):
        value = f"{{{', '.join(f'{key}: {item}' for key, item in value.items())}}}"
    if isinstance(value, list):
        value = f"[{', '.join(map(str, value))}]"
    if isinstance(value, bool):
        value = str(value).lower()
    shown = f"{value:,}".replace(",", "_") if isinstance(value, int) and value >= 10_000 else value
    return f", default `{shown}`"
