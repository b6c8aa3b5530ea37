"""For each setting a value that changes what is computed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel


@dataclass(frozen=True)
class Row:
    """`value` of a setting beside `base`, the settings of an entry that differ from BASE. `*` in a path is the name "s"."""

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


BASE: dict[str, Any] = {
    "mask_structure": "2:4",
    "traces": {"sampling": {"max_new_tokens": 12, "temperature": 1.0}},
    "calibration": {"tokens": 300, "held_out_tokens": 0},
}
FILE = {"source": "problems.jsonl", "column": "problem"}
DATASET = {"source": "some/dataset", "column": "problem"}
INT4 = {"config_groups": {"g": {"weights": {"num_bits": 4, "strategy": "group", "group_size": 32}}}}
INT4_16 = {"g": {"weights": {"num_bits": 4, "strategy": "group", "group_size": 16}}}
PLAIN = {"mask_structure": None, "sparsity": 0.5}
SPARSEGPT = {"preset": "paper", "mask_structure": None, "sparsity": 0.5}
CHECKED = traces(problems={**FILE, "answer_column": "answer"})

RECOVER = {
    "tokens": 300,
    "held_out_tokens": 64,
    "step_tokens": 64,
    "batch_tokens": 64,
    "learning_rate": 1e-3,
}


def recovered_text(generic: dict[str, Any]) -> dict[str, Any]:
    return {"recover": {**RECOVER, "generic_share": 0.3, "generic": generic}}


NAMED_TEXT = [
    Row("source", "text.txt"),
    Row("column", "other", {"source": "text.jsonl", "column": "text"}),
    Row("split", "test", {"source": "some/dataset", "column": "text"}),
    Row("config", "x", {"source": "some/dataset", "column": "text"}),
    Row("sequence_tokens", 64),
]
PRUNED = [
    Row("sparsity", 0.7, PLAIN),
    Row("mask_structure", "1:4"),
    Row("quantization.scheme", "W8A8", {"quantization": {"scheme": "FP8_DYNAMIC"}}),
    Row("quantization.config_groups", INT4_16, {"quantization": INT4}),
    Row("preset", "paper"),
    Row("solver", "magnitude"),
    Row("refit", True, SPARSEGPT),
    Row("reconstruct", "pruned"),
    Row("iterations", 2),
    Row("dampening_frac", 0.5),
    Row("order", "layer", {"reconstruct": "pruned"}),
    Row("experts", "all", {"calibration": {"tokens": 2000}}),
    Row("expert_floor", 64),
    Row("targets", ["re:.*mlp.*"]),
    Row("ignore", ["re:.*q_proj"]),
    Row("storage", "dense"),
    Row("tokenizer", "./nowhere"),
    Row("allocation", {"re:.*q_proj": 0.8}, PLAIN),
]  # fmt: skip
# Accepted here; the tests of recovery/ show what they change.
RECOVERED = [
    *(
        Row(f"recover.{name}", value, {"recover": RECOVER})
        for name, value in {
            "tokens": 500, "passes": 2, "learning_rate": 1e-2, "step_tokens": 128, "batch_tokens": 400,
            "held_out_tokens": 200, "activation_checkpointing": True, "folder": "problems.jsonl",
            "generic_share": 0.3,
        }.items()
    ),
    Row("recover.generic.source", "text.txt", recovered_text({})),
]  # fmt: skip

# Of a source of traces.
OF_SOURCES = [
    Row("store", "other.jsonl"),
    Row("problems.source", "problems.jsonl"),
    Row("problems.column", "other", traces(problems=FILE)),
    Row("problems.answer_column", "answer", traces(problems=FILE)),
    Row("problems.split", "test", traces(problems=DATASET)),
    Row("problems.config", "x", traces(problems=DATASET)),
    Row("problems.limit", 3, traces(problems=FILE)),
    Row("problems.max_prompt_tokens", 25, traces(problems=FILE)),
    Row("sampling.temperature", 0.2),
    Row("sampling.top_p", 0.3),
    Row("sampling.top_k", 2),
    Row("sampling.max_new_tokens", 8),
    Row("sampling.samples_per_problem", 2),
    Row("sampling.batch_size", 2),
    Row("sampling.seed", 1),
    Row("sampling.system_prompt", "be brief"),
    Row("sampling.template", "none"),
    Row("sampling.thinking", False),
    Row("select.answers", "correct", CHECKED),
    Row("select.finished", True),
    Row("select.min_tokens", 12),
    Row("select.max_tokens", 11),
    Row(
        "select.pass_rate",
        [0.5, 1.0],
        {"traces": {**CHECKED["traces"], "sampling": {"samples_per_problem": 2}}},
    ),
    Row("allow_off_policy", True, traces(store="foreign.jsonl")),
]
CALIBRATED = [
    *(Row(f"traces.{row.path}", row.value, row.base) for row in OF_SOURCES),
    *(
        Row(f"traces.sources.*.{path}", value, {"traces": {"sources": {"s": {"problems": {}}}}, **mixture("traces:s@1")})
        for path, value in {
            "problems.source": "problems.jsonl", "select.finished": True,
        }.items()
    ),
    Row("calibration.tokens", 200),
    Row("calibration.mixture", "traces@0.5, prompts@0.5"),
    Row("calibration.max_sequence_tokens", 16),
    Row("calibration.batch_tokens", 64),
    Row("calibration.held_out_tokens", 50),
    Row("calibration.prompt_weight", 0.5),
    Row("calibration.seed", 1),
    *(Row(f"calibration.generic.{r.path}", r.value, mixture("text@1", generic=r.base)) for r in NAMED_TEXT),
]  # fmt: skip
# These are of servers; the tests of sampling/ and traces/ show what they change.
SERVED = {
    f"traces.engine.{name}"
    for name in ("base_urls", "model", "concurrency", "timeout", "verify_model", "api_key_env")
}
# Groups that are used in several places, of which a test looks at one.
_SAME = {"traces.sources.*.": "traces.", "recover.generic.": "calibration.generic."}


def group_once(path: str) -> str:
    """The path of a setting in the first place where its group is used."""
    for place, first in _SAME.items():
        if path.startswith(place):
            return first + path.removeprefix(place)
    return path


def leaves(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The path of every setting below `model`, `*` for names that a user chooses."""
    for name, info in model.model_fields.items():
        path = f"{prefix}{name}"
        groups = list(_groups(info.annotation, path))
        yield from (leaf for group, where in groups for leaf in leaves(group, f"{where}."))
        if not groups:
            yield path


def _groups(annotation: Any, path: str) -> Iterator[tuple[type[BaseModel], str]]:
    """The models that a field can hold, with their paths."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, path
    elif get_origin(annotation) is dict:
        yield from _groups(get_args(annotation)[1], f"{path}.*")
    elif get_origin(annotation) in (Union, UnionType):
        for option in get_args(annotation):
            if option is not NoneType:
                yield from _groups(option, path)


def nested(path: str, value: Any) -> dict[str, Any]:
    """{"a": {"b": value}} for "a.b"."""
    for name in reversed(path.replace("*", "s").split(".")):
        value = {name: value}
    return dict(value)
