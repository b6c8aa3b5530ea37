"""Keep the paths of a machine out of files that are passed on: models, records, cards, trace stores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

_REASONER = (
    "rac_modifier",
    "reasoner",
    "assets",
)  # the embedded model; the command line calls it "reasoner"


def public_name(name: str | Path) -> str:
    """A hub id or relative path as it is; of an absolute path the hub id, in the hub's cache, or else its last name.

    Example:
        public_name("Qwen/Qwen3-8B") == "Qwen/Qwen3-8B"; public_name("/data/models/Qwen3-8B") == "Qwen3-8B"
    """
    text = str(name)
    if not _is_absolute(text):
        return text
    parts = PureWindowsPath(text).parts
    if parts[-3:] == _REASONER:
        return "reasoner"
    if parts[-2:-1] == ("snapshots",) and parts[-3].startswith("models--"):
        return parts[-3].removeprefix("models--").replace("--", "/")
    return parts[-1]


def without_paths(value: Any) -> Any:
    """A copy of a record (mappings, sequences, strings) in which each absolute path is replaced by its public name.

    A path is recognized where it is a whole string, and then replaced wherever it occurs in the other strings.
    """
    return _replaced(value, sorted(set(_paths(value)), key=len, reverse=True))


def text_without_paths(text: str, parsed: Any) -> str:
    """The text of a file, with the absolute paths of what was parsed from it replaced by their public names."""
    return str(_replaced(text, sorted(set(_paths(parsed)), key=len, reverse=True)))


def _is_absolute(text: str) -> bool:
    """Whether a string is an absolute path of at least two names, so that "/no_think" in a prompt is none."""
    path = PureWindowsPath(text)  # splits at both kinds of slash
    rooted = text.startswith(("/", "~/", "file:///")) or bool(path.drive and path.root)
    named = len(path.parts) > 2 or (len(path.parts) == 2 and Path(text).exists())
    return rooted and named and "\n" not in text


def _paths(value: Any) -> Iterator[str]:
    if isinstance(value, (str, Path)):
        if _is_absolute(str(value)):
            yield str(value)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _paths(key)
            yield from _paths(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _paths(item)


def _replaced(value: Any, paths: list[str]) -> Any:
    if isinstance(value, (str, Path)):
        text = str(value)
        for path in paths:
            text = text.replace(path, public_name(path))
        return text
    if isinstance(value, Mapping):
        return {_replaced(key, paths): _replaced(item, paths) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_replaced(item, paths) for item in value]
    return value
