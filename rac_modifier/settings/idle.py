"""Which settings have no effect with which others. A user's are refused; dumps omit them.

A setting has an effect if it can change what is computed, written or refused. Each function
returns all settings without an effect, written or not: {path: why}.
"""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import BaseModel

from rac_modifier.errors import RacError
from rac_modifier.settings.base import Path, written_value
from rac_modifier.settings.calibration import CalibrationSettings, GenericText, Part
from rac_modifier.settings.presets import PRESETS
from rac_modifier.settings.problems import ProblemSource
from rac_modifier.settings.pruning import PruningSettings
from rac_modifier.settings.recovery import RecoverySettings
from rac_modifier.settings.sampling import SamplingSettings
from rac_modifier.settings.traces import SelectSettings, TraceSettings

Idle = dict[Path, str]
Rule = tuple[bool, str, str]
"""Where the first holds, the settings named in the second have no effect, because of the third."""

_NO_TRACES = "with a mixture without traces"
_OF_COMPLETIONS = "temperature top_p top_k max_new_tokens samples_per_problem batch_size"
_OF_TRACES = "calibration.answer_weight calibration.trace_weighting"


def refuse_idle(settings: BaseModel, idle: Idle) -> None:
    """Refuse settings that the user wrote and that have no effect, all in one message.

    Raises:
        RacError: naming each with its value and why it has no effect.
    """
    lines = []
    for path, why in idle.items():
        value = written_value(settings, path)
        if isinstance(value, BaseModel):
            value = value.model_dump(mode="json", exclude_unset=True)
        if value is not None:
            lines.append(f"{'.'.join(path)}: {value!r} has no effect {why}; leave it out")
    if lines:
        raise RacError("\n".join(lines))


def _idle(rules: list[Rule], where: Path = ()) -> Idle:
    """The settings below `where` that the rules name; of several rules the last one says why."""
    return {
        (*where, *name.split(".")): why
        for holds, names, why in rules
        if holds
        for name in names.split()
    }


def idle_pruning(settings: PruningSettings) -> Idle:
    """Of what an entry sets about pruning itself."""
    solver, pattern = settings.solver, settings.pattern
    structured = pattern is not None and pattern.is_structured
    preset = PRESETS[settings.preset]
    idle = _idle([
        (structured, "sparsity allocation", "with an N:M mask_structure"),
        (solver == "keep", "sparsity allocation", "with solver: keep: the zeros are the model's"),
        (
            solver == "none",
            "sparsity mask_structure allocation refit storage",
            "with solver: none, which prunes nothing",
        ),
        (solver != "sparsegpt", "block_size", f"with solver: {solver}; sparsegpt uses it"),
        (solver != "alps", "iterations", f"with solver: {solver}; alps uses it"),
        (solver in ("alps", "keep"), "refit", f"with solver: {solver}, which always refits"),
        (
            not settings.fits_weights,
            "dampening_frac",
            f"with solver: {solver} without refit, quantization or reconstruct: dense",
        ),
        (
            not settings.fits_weights and solver == "magnitude",
            f"calibration.prompt_weight {_OF_TRACES} experts expert_floor",
            "with solver: magnitude, which reads no activations",
        ),
        (
            settings.experts == "all",
            "expert_floor",
            "with experts: all, which gives each expert every token",
        ),
        (
            settings.order == "layer",
            "experts expert_floor",
            "with order: layer (or preset: paper), which calibrates experts on all tokens",
        ),
    ])  # fmt: skip
    if all(name in settings.model_fields_set or (name,) in idle for name in preset):
        idle["preset",] = f"with {', '.join(preset)}, which are all that it sets"
    return idle


def idle_activations(settings: PruningSettings, calibration: CalibrationSettings) -> Idle:
    """Of what an entry sets about the bits of activations."""
    quantization, name = settings.quantization, "int8_activation_limit"
    if quantization is None:
        return {}
    return _idle(
        [
            (not calibration.held_out_tokens, name, "with calibration.held_out_tokens: 0"),
            (not calibration.parts("traces"), name, _NO_TRACES),
            (not quantization.has_integers, name, "with weights that are floats"),
            (settings.storage == "dense", name, "with storage: dense"),
            (
                not settings.prunes,
                name,
                "with solver: none; run rac activations on the result",
            ),
        ],
        ("quantization",),
    )


def idle_recovery(settings: RecoverySettings | None, where: Path = ()) -> Idle:
    """Of what is set about recovery; `where` is its place in an entry."""
    if settings is None:
        return {}
    if not settings.generic_share:
        return {(*where, "generic"): "with generic_share: 0"}
    return _idle_in_text((*where, "generic"), settings.generic)


def idle_calibration(traces: TraceSettings, calibration: CalibrationSettings) -> Idle:
    """Of what an entry sets about traces and calibration."""
    idle = _idle_in_mixture(calibration)
    sampled, asked = calibration.parts("traces"), calibration.parts("traces", "prompts")
    if not asked:
        return {**idle, ("traces",): "with a mixture without traces and prompts"}
    stores = {part.name for part in sampled}
    unnamed = {part.name for part in asked}
    idle |= _idle(
        [
            (
                not any(traces.named(name).store for name in stores),
                "allow_off_policy",
                "without a store: a default store holds the model's own traces",
            ),
            (traces.engine is None, "retry_failed", "without traces.engine"),
            (
                None not in stores,
                "store",
                "since each named source has its own: traces.sources.<name>.store",
            ),
            (None not in unnamed, "problems", "since each part of the mixture names its own"),
            (not sampled, "store allow_off_policy engine retry_failed", _NO_TRACES),
        ],
        ("traces",),
    )
    for name in traces.sources:
        if name not in stores:
            idle["traces", "sources", name, "store"] = (
                f"unless traces:{name} has a share of the mixture"
            )
        if name not in unnamed:
            idle["traces", "sources", name] = f"unless the mixture names it: traces:{name}"
    for where, group, parts in _groups(traces, asked):
        of_traces = [traces.named(part.name) for part in parts if part.kind == "traces"]
        if parts:
            idle |= _idle(_rules_of(group, traces, of_traces), where)
        else:
            idle[where] = "since each named source of the mixture has its own"
        if isinstance(group, SelectSettings) and not of_traces:
            idle[where] = _NO_TRACES
    return idle


_Group = ProblemSource | SamplingSettings | SelectSettings


def _groups(traces: TraceSettings, asked: list[Part]) -> Iterator[tuple[Path, _Group, list[Part]]]:
    """Yield each group of settings with its path and the parts of the mixture that use it."""
    sources = {part: traces.sources.get(part.name or "") for part in asked}
    if plain := [part for part in asked if part.name is None]:
        yield ("traces", "problems"), traces.problems, plain
    for name in ("sampling", "select"):
        inherit = [part for part in asked if getattr(sources[part], name, None) is None]
        yield ("traces", name), getattr(traces, name), inherit
    for key, source in traces.sources.items():
        parts = [part for part in asked if part.name == key]
        for name in ("problems", "sampling", "select"):
            if parts and (group := getattr(source, name)) is not None:
                yield ("traces", "sources", key, name), group, parts


def _rules_of(group: _Group, traces: TraceSettings, of_traces: list[TraceSettings]) -> list[Rule]:
    """The rules within one group, which the sources in `of_traces` use to sample traces."""
    if isinstance(group, ProblemSource):
        no_dataset = group.is_generator or group.is_file
        return [
            (no_dataset, "split", f"with source: {group.source}, which is no dataset"),
            (not of_traces, "answer_column max_prompt_tokens", _NO_TRACES),
        ]
    if isinstance(group, SamplingSettings):
        return [
            (group.template == "none", "thinking", "with template: none"),
            (group.top_k == 1, "temperature top_p", "with top_k: 1, which is greedy"),
            (group.temperature == 0, "top_p top_k", "with temperature: 0, which is greedy"),
            (
                traces.engine is not None,
                "batch_size",
                "with traces.engine; traces.engine.concurrency is that of servers",
            ),
            (not of_traces, _OF_COMPLETIONS, _NO_TRACES),
        ]
    longest = max((source.sampling.max_new_tokens for source in of_traces), default=1)
    is_longer = group.max_tokens is not None and group.max_tokens >= longest
    return [
        (group.finished, "repeated_tails", "with finished: true, which keeps no cut completion"),
        (
            # a store of another model's may hold longer ones
            is_longer and not any(source.allow_off_policy for source in of_traces),
            "max_tokens",
            f"with sampling.max_new_tokens={longest}",
        ),
    ]


def _idle_in_mixture(calibration: CalibrationSettings) -> Idle:
    traces, generic = calibration.parts("traces"), calibration.parts("generic")
    alike = not traces and not (calibration.parts("prompts") and generic)
    idle = _idle(
        [
            (alike, "prompt_weight", "with a mixture whose tokens all weigh the same"),
            (not traces, "answer_weight trace_weighting held_out_tokens", _NO_TRACES),
        ],
        ("calibration",),
    )
    texts = {("generic",): (Part("generic"), calibration.generic)} | {
        ("texts", name): (Part("generic", name), text) for name, text in calibration.texts.items()
    }
    for where, (part, text) in texts.items():
        if part in generic:
            idle |= _idle_in_text(("calibration", *where), text)
        else:
            idle["calibration", *where] = f"unless the mixture names it: {part.key}"
    return idle


def _idle_in_text(where: Path, text: GenericText) -> Idle:
    return _idle(
        [
            (not text.has_columns, "column", f"with source: {text.source}, without columns"),
            (not text.is_dataset, "split config", f"with source: {text.source}, no dataset"),
        ],
        where,
    )
