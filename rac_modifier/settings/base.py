"""What all settings share: unknown names are refused, and which settings the user wrote can be asked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Path = tuple[str, ...]
"""Where a setting is: ("traces", "sampling", "seed")."""

Count = Annotated[int, Field(ge=1, le=10**9)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]  # as numpy takes it
Batch = Annotated[int, Field(ge=1, le=65_536)]
Share = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0, le=1e6)]

# The text below a field is its description, on the command line, in the JSON Schema and in docs/.
CONFIG = ConfigDict(extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class Settings(BaseModel):
    """A group of settings: it does not change once it is validated, and unknown names are refused.

    `model_fields_set` holds what the user wrote; a validator that fills in a preset keeps it so
    (`keep_as_written`).
    """

    model_config = ConfigDict(**CONFIG, frozen=True)


def keep_as_written(settings: BaseModel, written: Mapping[str, Any]) -> None:
    """After a preset filled in values: count only `written`, the user's own values, as set."""
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
