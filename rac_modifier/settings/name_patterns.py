"""Check names of modules and `re:` patterns before a library matches them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from rac_modifier.errors import RacError

PREFIX = "re:"
_LENGTH = 500  # characters of a name or pattern
_REPEATS, _DIGIT_REPEATS = 64, 4  # ways in which `.*` and `\d+` are counted to match
_WAYS = 10 * _REPEATS**4
# Operators of `re`'s own parser, by what they hold.
_PLAIN = {"LITERAL", "NOT_LITERAL", "ANY", "IN", "AT", "CATEGORY"}
_DIGITS = str(re._parser.parse(r"\d"))  # type: ignore[attr-defined]
_REPEATING = {"MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"}


def check_names(names: Any, where: str) -> None:
    """Check module names, class names and `re:` patterns from a recipe or a checkpoint's config.

    A pattern is accepted if matching it against a name ends soon: at most four of `*`, `+` and
    wide `{m,n}`, no groups with choices or repeats inside a repeat, and no back references.

    Args:
        names: a list of texts.
        where: the setting, for messages.

    Raises:
        RacError: something else than a list of texts, a pattern that is no regular expression, or
            one that could take too long to match.
    """
    if not isinstance(names, Iterable) or isinstance(names, (str, bytes)):
        raise RacError(f"{where} is {str(names)[:80]!r}; write a list of names or re: patterns")
    for name in names:
        if not isinstance(name, str) or not name:
            raise RacError(f"{where} holds {str(name)[:80]!r}; write names or re: patterns as text")
        if len(name) > _LENGTH or not name.isprintable():
            raise RacError(
                f"{where}: {name[:80]!r} has over {_LENGTH} characters, or unprintable ones; "
                "write a shorter pattern"
            )
        if name.startswith(PREFIX):
            _check_pattern(name, where)


def _check_pattern(name: str, where: str) -> None:
    """Refuse a pattern that cannot be compiled, or that could match in too many ways."""
    pattern = name.removeprefix(PREFIX)
    try:
        re.compile(pattern)
        ways = _ways(re._parser.parse(pattern))  # type: ignore[attr-defined]
    except (re.error, OverflowError, RecursionError) as error:
        raise RacError(
            f"{where}: {name[:80]!r} is no regular expression ({error}); put a \\ before each of ( ) [ ] "
            "that stands for itself"
        ) from error
    if ways > _WAYS:
        raise RacError(
            f"{where}: {name[:80]!r} could take too long to match; use fewer of * and +, and none around "
            "a group that holds another one or a choice"
        )


def _ways(items: Any) -> int:
    """Count, from above, the ways in which the items of a parsed pattern can match a name."""
    ways = 1
    for operator, argument in items:
        ways *= _ways_of(str(operator), argument)
        if ways > _WAYS:
            return ways
    return ways


def _ways_of(operator: str, argument: Any) -> int:
    """The same of one item."""
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
    """Whether items match texts of one length in one way: characters and classes, in groups or not."""
    return all(
        str(operator) in _PLAIN or (str(operator) == "SUBPATTERN" and _is_plain(argument[-1]))
        for operator, argument in items
    )
