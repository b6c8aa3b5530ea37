"""Validate settings of any kind, and say what is wrong with them: the key, the value, the next step."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from rac_modifier.errors import RacError

S = TypeVar("S", bound=BaseModel)
_SHOWN = 100  # characters of a wrong value in a message


def check_settings(settings: type[S], values: Any, where: str) -> S:
    """Validate settings of any kind.

    Raises:
        RacError: with every mistake in one message.
    """
    try:
        return settings.model_validate(values)
    except ValidationError as error:
        raise RacError(f"{where}: {describe_errors(error, settings)}") from error


def describe_errors(error: ValidationError, settings: type[BaseModel] | None = None) -> str:
    """Pydantic's findings as `key.sub: what is wrong`, one per line; names that are close are from `settings`."""
    lines = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            message = f"there is no such setting (value {_shown(item['input'])}); {_meant(key, settings)}"
        elif item["type"] == "missing":
            message = "is missing; add it"
        elif item["type"] != "value_error":
            message = f"{message} (value {_shown(item['input'])})"
        elif item["loc"]:
            message = message.removeprefix(f"{item['loc'][-1]}: ")  # the key names it
        lines.append(f"{key}: {message}" if key else message)
    return "\n".join(lines)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _meant(key: str, settings: type[BaseModel] | None) -> str:
    """The next step for a setting that does not exist: one of the same name in another group, or a name that is close."""
    if settings is None:
        return "see `rac schema`"
    names = list(_names(settings))
    group, _, last = key.rpartition(".")
    own = [name for name in names if name.rpartition(".")[0] == group]
    close = difflib.get_close_matches(last, [name.rpartition(".")[2] for name in own], n=1)
    meant = [f"{group}.{name}" if group else name for name in close]
    meant = [name for name in names if name.rpartition(".")[2] == last] or meant
    return f"did you mean {' or '.join(meant)}?" if meant else f"use {', '.join(own)}"


def _names(settings: type[BaseModel], group: str = "") -> Iterator[str]:
    """Every setting as `key.sub`."""
    for name, field in settings.model_fields.items():
        yield f"{group}{name}"
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from _names(kind, f"{group}{name}.")
