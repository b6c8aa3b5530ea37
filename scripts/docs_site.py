"""Hooks of mkdocs.yml: pages of the site that are rendered from the code.

A page contains one of the comments below, and gets the rendered text in its place. So it is
never older than the code.

    <!-- settings: NAME -->    every setting of the recipe entry NAME, from its JSON Schema
    <!-- left-out: NAME -->    the settings of the pruning entry that the entry NAME does not have
    <!-- recipes -->           every shipped recipe: its comment, and its text
    <!-- commands -->          every command of `rac`: its help, its arguments and options
"""

import html
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from rac_modifier.cli import app
from rac_modifier.settings.entries import ENTRIES
from rac_modifier.settings.recipe_files import recipe, recipe_names

Place = tuple[str, ...]
"""Where a setting is: ("traces", "sampling")."""
PRUNING = "ReasoningAwareSparseGPTModifier"
_COMMENT = re.compile(r"^<!-- (settings|left-out|recipes|commands)(?:: (\w+))? -->$", re.MULTILINE)
_BOUNDS = {
    "minimum": "at least",
    "exclusiveMinimum": "above",
    "maximum": "at most",
    "exclusiveMaximum": "below",
}
_NAMES = {"string": "text", "boolean": "true or false", "object": "mapping by name"}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the rendered text in the place of each comment."""
    return _COMMENT.sub(lambda match: render(match[1], match[2]), markdown)


def render(kind: str, name: str | None) -> str:
    """Return the text for one comment of a page."""
    if kind == "recipes":
        return "\n\n".join(map(render_recipe, recipe_names()))
    if kind == "commands":
        return "\n".join(render_command(typer.main.get_command(app), "rac"))
    entry = ENTRIES[str(name)]
    if kind == "left-out":
        missing = [n for n in ENTRIES[PRUNING].model_fields if n not in entry.model_fields]
        return ", ".join(f"`{setting}`" for setting in missing)
    schema = entry.model_json_schema()
    return "\n".join(render_settings(schema, schema["$defs"], (), {}))


def render_recipe(name: str) -> str:
    """Return a heading with the recipe's name, the comment at its top, and the rest of its text."""
    lines = Path(recipe(name)).read_text(encoding="utf-8").splitlines()
    first = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    about = " ".join(line.removeprefix("#").strip() for line in lines[:first])
    return "\n".join([f"## {name}", "", _escaped(about), "", "```yaml", *lines[first:], "```"])


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


def render_settings(
    schema: dict[str, Any], groups: dict[str, Any], path: Place, seen: dict[str, Place]
) -> Iterator[str]:
    """Yield the settings of a schema as definitions; then, each under a heading, its groups.

    `seen` holds where each group is described already: the same group elsewhere gets a link to it.
    """
    new = []
    for name, entry in schema["properties"].items():
        if "description" not in entry:
            raise ValueError(f"{'.'.join((*path, name))}: this setting has no description; add one")
        group = next(iter(re.findall(r"#/\$defs/(\w+)", json.dumps(entry))), None)
        if group is not None and group not in seen:
            by_name = "additionalProperties" in entry
            seen[group] = (*path, name, "NAME") if by_name else (*path, name)
            new.append(group)
        anchor = "" if group in new else f"#{_anchor((*path, name))} "
        optional = _optional(entry, name in schema.get("required", ()))
        yield f"`{name}`{{ {anchor}.setting }} {_words(entry)}{optional}"
        link = f" Its settings: [{'.'.join(seen[group])}](#{_anchor(seen[group])})" if group else ""
        yield f":   {_escaped(entry['description'])}{link}"
        yield ""
    for group in new:
        yield from [f"## {'.'.join(seen[group])} {{ #{_anchor(seen[group])} }}", ""]
        yield from render_settings(groups[group], groups, seen[group], seen)


def _anchor(path: Place) -> str:
    return "-".join(path).lower()


def _escaped(text: str) -> str:
    return re.sub(r"([*_`\[\]])", r"\\\1", html.escape(text, quote=False))


def _words(entry: dict[str, Any]) -> str:
    """Return a type in words: "integer, at least 1", "`a` or `b`", "list of text"."""
    if "$ref" in entry:
        return "group of settings"
    if "anyOf" in entry:
        kinds = [_words(kind) for kind in entry["anyOf"] if kind.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    if "enum" in entry:
        return " or ".join(f"`{value}`" for value in entry["enum"])
    words = _NAMES.get(entry["type"], entry["type"])
    if entry["type"] == "array":
        words = f"list of {_words(entry['items'])}"
    return ", ".join(
        [words, *(f"{text} {entry[k]:,}" for k, text in _BOUNDS.items() if k in entry)]
    )


def _optional(entry: dict[str, Any], required: bool) -> str:
    """Return whether a setting is required, or its default."""
    value = entry.get("default")
    if required or value is None:
        return ", required" if required else ", optional"
    if "$ref" in entry or value in ({}, []):
        return ""
    text = str(value).lower() if isinstance(value, bool) else str(value).replace("'", "")
    return f", default `{text}`"
