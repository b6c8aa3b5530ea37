"""What all settings share: unknown names are refused, and which settings the user wrote can be asked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict

Path = tuple[str, ...]
"""Where a setting is: ("traces", "sampling", "seed")."""


class Settings(BaseModel):
    """A group of settings: it does not change once it is validated, and unknown names are refused.

    `model_fields_set` holds what the user wrote; a validator that fills in a preset keeps it so (`keep_as_written`).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)


def keep_as_written(settings: BaseModel, written: Mapping[str, Any]) -> None:
    """After a preset filled in values: count only `written`, the user's own values, as set."""
    settings.model_fields_set.intersection_update(written)


def written_value(holder: Any, path: Path) -> Any:
    """The value at `path` if the user wrote one, else None. `null`, `{}` and a group without any setting count as not written."""
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
    """A dump of settings without what is at `paths`, and with lists in place of tuples, so that YAML and JSON can hold it."""
    if isinstance(dump, Mapping):
        return {
            name: without_paths(value, {path[1:] for path in paths if path[:1] == (name,)})
            for name, value in dump.items()
            if (name,) not in paths
        }
    return (
        [without_paths(value, set()) for value in dump] if isinstance(dump, (list, tuple)) else dump
    )
