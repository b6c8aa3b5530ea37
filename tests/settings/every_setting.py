"""For each setting of pruning a value that changes the result, and helpers for nested settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """`value` of a setting next to `base`, the settings of an entry that differ from BASE."""

    path: str
    value: Any
    base: dict[str, Any] = field(default_factory=dict)


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings with those of `above` over those of `below`; None takes one out."""
    result = dict(below)
    for name, value in above.items():
        old = result.get(name)
        result[name] = (
            merged(old, value) if isinstance(value, Mapping) and isinstance(old, Mapping) else value
        )
        if value is None:
            del result[name]
    return result


def traces(**settings: Any) -> dict[str, Any]:
    return {"traces": settings}


def mixture(line: str, **settings: Any) -> dict[str, Any]:
    return {"calibration": {"mixture": line, **settings}}


def nested(path: str, value: Any) -> dict[str, Any]:
    """{"a": {"b": value}} for "a.b"."""
    for name in reversed(path.split(".")):
        value = {name: value}
    return dict(value)


BASE: dict[str, Any] = {
    "mask_structure": "2:4",
    "traces": {"sampling": {"max_new_tokens": 12, "temperature": 1.0}},
    "calibration": {"tokens": 300, "held_out_tokens": 0},
}
INT4 = {"config_groups": {"g": {"weights": {"num_bits": 4, "strategy": "group", "group_size": 32}}}}
INT4_16 = {"g": {"weights": {"num_bits": 4, "strategy": "group", "group_size": 16}}}
PLAIN = {"mask_structure": None, "sparsity": 0.5}
PRUNED = [
    Row("sparsity", 0.7, PLAIN),
    Row("mask_structure", "1:4"),
    Row("quantization.scheme", "W8A8", {"quantization": {"scheme": "FP8_DYNAMIC"}}),
    Row("quantization.config_groups", INT4_16, {"quantization": INT4}),
    Row("preset", "paper"),
    Row("solver", "magnitude"),
    Row("refit", True, {"preset": "paper", **PLAIN}),
    Row("reconstruct", "pruned"),
    Row("iterations", 2),
    Row("dampening_frac", 0.5),
    Row("order", "layer", {"reconstruct": "pruned"}),
    Row("expert_floor", 64),
    Row("targets", ["re:.*mlp.*"]),
    Row("ignore", ["re:.*q_proj"]),
    Row("storage", "dense"),
]
