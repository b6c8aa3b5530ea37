"""Shared by all settings: unknown names are refused; errors tell key, value, next step."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rac_modifier.errors import RacError

Path = tuple[str, ...]
"""Where a setting is: ("traces", "sampling", "seed")."""

Count = Annotated[int, Field(ge=1, le=10**9)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]  # as numpy takes it
Batch = Annotated[int, Field(ge=1, le=65_536)]
Share = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0, le=1e6)]

# The text below a field is its description, on the command line, in the JSON Schema and in docs/.
CONFIG = ConfigDict(extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)
S = TypeVar("S", bound=BaseModel)
PREFIX = "re:"
_NAME_LENGTH = 500  # characters of a name or pattern
_REPEATS, _DIGIT_REPEATS = 64, 4  # ways in which `.*` and `\d+` are counted to match
_WAYS = 10 * _REPEATS**4
# Operators of `re`'s own parser.
_PLAIN = {"LITERAL", "NOT_LITERAL", "ANY", "IN", "AT", "CATEGORY"}
_DIGITS = str(re._parser.parse(r"\d"))  # type: ignore[attr-defined]
_REPEATING = {"MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"}
_SHOWN = 100  # characters of a wrong value in a message
_REMOVED = {
    "block_size": "sparsegpt prunes 128 columns at a time",
    "sweeps": "rounded weights get three sweeps",
    "int8_activation_limit": "run rac inspect OUTPUT --activations 0.01 on the result",
    "texts": "set calibration.generic, or name a source in the mixture: text:FILE",
    "retry_failed": "remove the .failed.jsonl next to the store to try its problems again",
    "repeated_tails": "tails that repeat are always cut",
    "tries": "a completion is requested nine times",
    "answer_weight": "generated tokens weigh 1; prompt_weight is the weight of the others",
    "trace_weighting": "each token of a trace weighs the same",
    "recover.seed": "the seed is 0",
    "evaluation.seed": "the seed is 0",
}
"""What to do about settings of version 0.1, by the end of their path."""


class Settings(BaseModel):
    """A group of settings: frozen, and without unknown names.

    `model_fields_set` holds what the user wrote, also where a preset filled in more
    (`keep_as_written`).
    """

    model_config = ConfigDict(**CONFIG, frozen=True)


def keep_as_written(settings: BaseModel, written: Mapping[str, Any]) -> None:
    """Count only `written`, the user's own values, as set."""
    settings.model_fields_set.intersection_update(written)


def written_value(holder: Any, path: Path) -> Any:
    """Return the value at `path` if the user wrote one, else None.

    `null`, `{}` and a group without any setting count as not written.
    """
    for name in path:
        if isinstance(holder, Mapping):
            holder = holder.get(name)
        elif isinstance(holder, BaseModel) and name in holder.model_fields_set:
            holder = getattr(holder, name)
        else:
            return None
    return None if _is_blank(holder) else holder


def _is_blank(value: Any) -> bool:
    if isinstance(value, BaseModel):
        return all(_is_blank(getattr(value, name)) for name in value.model_fields_set)
    return value is None or value == {}


def without_paths(dump: Any, paths: set[Path]) -> Any:
    """Return a dump of settings without what is at `paths`, in types that YAML and JSON have."""
    if isinstance(dump, Mapping):
        return {
            name: without_paths(value, {path[1:] for path in paths if path[:1] == (name,)})
            for name, value in dump.items()
            if (name,) not in paths
        }
    is_list = isinstance(dump, (list, tuple))
    return [without_paths(value, set()) for value in dump] if is_list else dump


def check_settings(settings: type[S], values: Any, where: str) -> S:
    """Validate settings of any kind (RacError: with every mistake in one message)."""
    try:
        return settings.model_validate(values)
    except ValidationError as error:
        raise RacError(f"{where}: {describe_errors(error, settings)}") from error


def describe_errors(error: ValidationError, settings: type[BaseModel] | None = None) -> str:
    """Return a line `key.sub: what is wrong` per mistake; `settings` offer names that are close."""
    lines = []
    for item in error.errors():
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
        lines.append(f"{key}: {message}" if key else message)
    return "\n".join(lines)


def _next_step(key: str, settings: type[BaseModel] | None) -> str:
    """Say what replaces a setting that does not exist, or which existing name is close."""
    group, _, last = key.rpartition(".")
    for removed, why in _REMOVED.items():
        if f".{key}".endswith(f".{removed}"):
            return f"leave it out: {why}"
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
    """Check module names, class names and `re:` patterns from a recipe or a checkpoint's config.

    A pattern is accepted if matching it against a name ends soon: at most four of `*`, `+` and
    wide `{m,n}`, no groups with choices or repeats inside a repeat, and no back references.

    Raises:
        RacError: no list of texts, no regular expression, or one that takes too long to match;
            `where` is the setting.
    """
    if not isinstance(names, Iterable) or isinstance(names, (str, bytes)):
        raise RacError(f"{where} is {str(names)[:80]!r}; write a list of names or re: patterns")
    for name in names:
        if not isinstance(name, str) or not name:
            raise RacError(f"{where} holds {str(name)[:80]!r}; write names or re: patterns as text")
        if len(name) > _NAME_LENGTH or not name.isprintable():
            raise RacError(
                f"{where}: {name[:80]!r} has over {_NAME_LENGTH} characters, or unprintable ones; "
                "write a shorter pattern"
            )
        if not name.startswith(PREFIX):
            continue
        try:
            re.compile(name.removeprefix(PREFIX))
            ways = _ways(re._parser.parse(name.removeprefix(PREFIX)))  # type: ignore[attr-defined]
        except (re.error, OverflowError, RecursionError) as error:
            raise RacError(
                f"{where}: {name[:80]!r} is no regular expression ({error}); put a \\ before each "
                "of ( ) [ ] that is part of a name"
            ) from error
        if ways > _WAYS:
            raise RacError(
                f"{where}: {name[:80]!r} could take too long to match; use fewer of * and +, and "
                "none around a group that holds another one or a choice"
            )


def _ways(items: Any) -> int:
    """Bound from above in how many ways a parsed pattern can match a name."""
    ways = 1
    for operator, argument in items:
        ways = min(ways * _ways_of(str(operator), argument), _WAYS + 1)
    return ways


def _ways_of(operator: str, argument: Any) -> int:
    if operator in _PLAIN:
        return 1
    if operator in _REPEATING:
        least, most, body = argument
        if most > 1 and not _is_plain(body):
            return _WAYS + 1
        limit = _DIGIT_REPEATS if str(body) == _DIGITS else _REPEATS
        return _ways(body) * min(int(most) - int(least) + 1, limit)
    if operator == "BRANCH":
        return sum(map(_ways, argument[1]))
    if operator in ("SUBPATTERN", "ASSERT", "ASSERT_NOT"):
        return _ways(argument[-1])
    if operator == "ATOMIC_GROUP":
        return _ways(argument)
    return _WAYS + 1  # back references


def _is_plain(items: Any) -> bool:
    """Tell whether items are characters and classes, in groups or not."""
    return all(
        str(operator) in _PLAIN or (str(operator) == "SUBPATTERN" and _is_plain(argument[-1]))
        for operator, argument in items
    )
