"""Shared by all settings: unknown names are refused; errors tell key, value, next step."""

import difflib
import re
from collections.abc import Iterable, Iterator
from functools import reduce
from typing import Annotated, Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rac_modifier.errors import RacError, refusing

Count = Annotated[int, Field(ge=1, le=10**9)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]  # as numpy takes it
Batch = Annotated[int, Field(ge=1, le=65_536)]

# The text below a field is its description, on the command line, in the JSON Schema and in docs/.
CONFIG = ConfigDict(extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)
S = TypeVar("S", bound=BaseModel)
PREFIX = "re:"
_NAME_LENGTH = 500  # characters of a name or pattern
_REPEATS = 64  # ways in which `.*` is counted to match
_WAYS = 10 * _REPEATS**3  # of all patterns of a list: each is tried on each module
_DIGITS = re.compile(r"\\d[*+](?![*+?{])")
# A class such as [qk], or an escape that is no back reference.
_CHARACTER = re.compile(r"\[\^?\]?(?:\\.|[^]\\])*\]|\\[^1-9]")
# A group without groups inside. Comments, conditions and flags do not match.
_GROUP = re.compile(r"\((?:\?(?:[:=!>]|<[=!]|P<\w+>)|(?!\?))([^()]*)\)([*+{]?)")
_QUANTIFIER = re.compile(r"[*+{]|(?<![*+}])\?")
_SHOWN = 100  # characters of a wrong key or value in a message
_MOST_SHOWN = 20  # mistakes in a message


class Settings(BaseModel):
    """A group of settings: frozen, and without unknown names."""

    model_config = ConfigDict(**CONFIG, frozen=True)


def refuse_idle(settings: BaseModel, *rules: tuple[bool, str, str]) -> None:
    """Refuse changed settings that have no effect (RacError: all of them).

    A rule: (holds, "key.sub other", why).
    """
    lines = []
    for holds, names, why in rules:
        for name in names.split() if holds else ():
            *groups, last = name.split(".")
            group = reduce(getattr, groups, settings)
            value = getattr(group, last)
            if value == type(group).model_fields[last].default:
                continue
            if isinstance(value, BaseModel):
                value = value.model_dump(mode="json", exclude_defaults=True)
            lines.append(f"{name}: {value!r} has no effect {why}; leave it out")
    if lines:
        raise RacError("\n".join(lines))


def check_settings(settings: type[S], values: Any, where: str) -> S:
    """Validate settings of any kind (RacError: with every mistake in one message)."""
    try:
        return settings.model_validate(values)
    except ValidationError as error:
        raise RacError(f"{where}: {describe_errors(error, settings)}") from error


def describe_errors(error: ValidationError, settings: type[BaseModel] | None = None) -> str:
    """Return a line `key.sub: what is wrong` per mistake; `settings` offer names that are close."""
    lines, errors = [], error.errors()
    for item in errors[:_MOST_SHOWN]:
        key = ".".join(str(part) for part in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        value = repr(item["input"])
        value = value if len(value) <= _SHOWN else f"{value[:_SHOWN]}..."
        if item["type"] == "extra_forbidden":
            message = f"there is no such setting (value {value}); {_next_step(key, settings)}"
        elif item["type"] == "missing":
            message = "is missing; add it"
        elif item["type"] != "value_error":
            choices = re.findall(r"'([^']*)'", str(item.get("ctx", {}).get("expected", "")))
            close = difflib.get_close_matches(str(item["input"]), choices, n=1)
            meant = f"; did you mean {close[0]!r}?" if close else ""
            message = f"{message.replace('Input should be', 'must be')}{meant} (value {value})"
        elif item["loc"]:
            message = message.removeprefix(f"{item['loc'][-1]}: ")  # the key names it
        lines.append(f"{key[:_SHOWN]}: {message}" if key else message)
    if len(errors) > _MOST_SHOWN:
        lines.append(f"and {len(errors) - _MOST_SHOWN:,} more")
    return "\n".join(lines)


def _next_step(key: str, settings: type[BaseModel] | None) -> str:
    """Say what replaces a setting that does not exist, or which existing name is close."""
    group, _, last = key.rpartition(".")
    if settings is None:
        return "see `rac schema`"
    names = list(_names(settings))
    siblings = [name for name in names if name.rpartition(".")[0] == group]
    close = difflib.get_close_matches(last, [name.rpartition(".")[2] for name in siblings], n=1)
    meant = [f"{group}.{name}" if group else name for name in close]
    meant = [name for name in names if name.rpartition(".")[2] == last] or meant
    return f"did you mean {' or '.join(meant)}?" if meant else f"use {', '.join(siblings)}"


def _names(settings: type[BaseModel], group: str = "") -> Iterator[str]:
    """Yield every setting as `key.sub`."""
    for name, field in settings.model_fields.items():
        yield f"{group}{name}"
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from _names(kind, f"{group}{name}.")


def check_names(names: Any, where: str) -> None:
    """Check module names, class names and `re:` patterns of the setting `where` (RacError)."""
    if not isinstance(names, Iterable) or isinstance(names, (str, bytes)):
        raise RacError(f"{where} is {str(names)[:80]!r}; write a list of names or re: patterns")
    ways = 0
    for name in names:
        is_text = isinstance(name, str) and name.isprintable()
        if not is_text or not 0 < len(name) <= _NAME_LENGTH:
            raise RacError(
                f"{where} holds {str(name)[:80]!r}; write names or re: patterns of up to "
                f"{_NAME_LENGTH} printable characters"
            )
        if not name.startswith(PREFIX):
            continue
        pattern = name.removeprefix(PREFIX)
        problem = f"{where}: {name[:80]!r} is no regular expression"
        step = "put a \\ before each of ( ) [ ] that is part of a name"
        with refusing(problem, step, re.error, OverflowError, RecursionError):
            re.compile(pattern)
        ways += _ways(pattern)
        if ways > _WAYS:
            raise RacError(
                f"{where}: {name[:80]!r} could take too long to match; use fewer patterns, and in "
                "them fewer of * and +, none around a group that holds another one or a choice, "
                "and no (?...) except (?:...)"
            )


def _ways(pattern: str) -> int:
    """Bound from above in how many ways a pattern can match a name."""
    numbers = _DIGITS.sub("x?x?x?", pattern)  # 8 ways: names hold short numbers (files.py)
    text, ways = _CHARACTER.sub("x", numbers).replace("(?i)", ""), 1
    while group := _GROUP.search(text):
        body, repeat = group.groups()
        if repeat and re.search(r"[*+?{|]", body):
            return _WAYS + 1
        ways *= 1 + body.count("|")
        text = text[: group.start()] + body + repeat + text[group.end() :]
    if "(" in text or "\\" in text:  # flags, comments, back references
        return _WAYS + 1
    for quantifier in _QUANTIFIER.findall(text):
        ways *= 2 if quantifier == "?" else _REPEATS
    return ways
