"""Validate settings of any kind, and say what is wrong with them: the key, the value, the next step."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

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
            message = (
                f"there is no such setting (value {_shown(item['input'])}); {_meant(key, settings)}"
            )
        elif item["type"] == "missing":
            message = "is missing; add it"
        elif item["type"] != "value_error":
            message = f"{_in_plain_words(item)} (value {_shown(item['input'])})"
        elif item["loc"]:
            message = message.removeprefix(f"{item['loc'][-1]}: ")  # the key names it
        lines.append(f"{key}: {message}" if key else message)
    return "\n".join(lines)


_PLAIN = {
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be at most {le}",
    "finite_number": "must be a finite number",
    "literal_error": "must be {expected}",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "int_parsing_size": "must be a smaller whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "string_type": "must be text; put it in quotes",
    "string_too_short": "must not be empty",
    "list_type": "must be a list, such as [a, b]",
    "tuple_type": "must be a list, such as [a, b]",
    "dict_type": "must be settings by name, such as {{name: value}}",
    "model_type": "must be settings by name, such as {{name: value}}",
}


def _in_plain_words(item: ErrorDetails) -> str:
    """What the value has to be; pydantic's own words where there are no plainer ones."""
    words = _PLAIN.get(item["type"])
    if words is None:
        return item["msg"]
    message = words.format(**item.get("ctx", {}))
    if item["type"] == "literal_error":
        known = re.findall(r"'([^']*)'", item["ctx"]["expected"])
        close = difflib.get_close_matches(str(item["input"]), known, n=1)
        message += f"; did you mean {close[0]!r}?" if close else ""
    return message


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _meant(key: str, settings: type[BaseModel] | None) -> str:
    """The next step for a setting that does not exist: one of the same name in another group, or a name that is close."""
    if settings is None:
        return "see `rac schema`"
    names = list(_names(settings))
    group, _, last = key.rpartition(".")
    siblings = [name for name in names if name.rpartition(".")[0] == group]
    close = difflib.get_close_matches(last, [name.rpartition(".")[2] for name in siblings], n=1)
    meant = [f"{group}.{name}" if group else name for name in close]
    meant = [name for name in names if name.rpartition(".")[2] == last] or meant
    return f"did you mean {' or '.join(meant)}?" if meant else f"use {', '.join(siblings)}"


def _names(settings: type[BaseModel], group: str = "") -> Iterator[str]:
    """Every setting as `key.sub`."""
    for name, field in settings.model_fields.items():
        yield f"{group}{name}"
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from _names(kind, f"{group}{name}.")
