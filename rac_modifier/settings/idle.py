"""Which settings have no effect beside which others. Where a user wrote one it is refused; dumps and run records omit it.

A setting has an effect if it can change what is computed, written or refused. Each function returns {where: why}: all
settings without an effect, whether they were written or not, and why, with the next step.
"""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import BaseModel

from rac_modifier.errors import RacError
from rac_modifier.settings.base import Path, written_value
from rac_modifier.settings.calibration import (
    CalibrationBudget,
    CalibrationSettings,
    GenericText,
    Part,
)
from rac_modifier.settings.presets import PRESETS
from rac_modifier.settings.problems import ProblemSource
from rac_modifier.settings.pruning import UNSTRUCTURED, PruningSettings
from rac_modifier.settings.recovery import RecoverySettings
from rac_modifier.settings.sampling import SamplingSettings
from rac_modifier.settings.traces import SelectSettings, TraceSettings

Idle = dict[Path, str]

_NO_TRACES = (
    "beside a mixture without traces; leave it out, or give traces a share of calibration.mixture"
)
# What sampling sets for traces alone; the rest shapes the prompts, and the order of the problems.
_OF_COMPLETIONS = (
    "temperature",
    "top_p",
    "top_k",
    "max_new_tokens",
    "samples_per_problem",
    "batch_size",
)


def refuse_idle(settings: BaseModel, idle: Idle) -> None:
    """Refuse settings that the user wrote and that have no effect, all in one message.

    Raises:
        RacError: naming each with its value, why it has no effect, and the next step.
    """
    lines = []
    for path, why in idle.items():
        value = written_value(settings, path)
        if value is not None:
            shown = (
                value.model_dump(mode="json", exclude_unset=True)
                if isinstance(value, BaseModel)
                else value
            )
            lines.append(f"{'.'.join(path)}: {shown!r} has no effect {why}")
    if lines:
        raise RacError("\n".join(lines))


def idle_pruning(settings: PruningSettings) -> Idle:
    """Of what an entry sets about pruning itself."""
    solver, idle = settings.solver, Idle()
    if solver == "keep":
        why = "beside solver: keep, since the zeros are the model's"
        idle["sparsity",] = f"{why}; leave it out"
        idle["allocation",] = f"{why}; leave it out"
    elif solver == "none":
        why = "beside solver: none, which prunes nothing; leave it out"
        for name in ("sparsity", "mask_structure", "allocation", "refit", "refit_steps", "storage"):
            idle[name,] = why
    elif settings.pattern is not None and settings.pattern.is_structured:
        idle["sparsity",] = "beside an N:M mask_structure; leave it out"
        idle["allocation",] = (
            f'beside mask_structure "{settings.pattern.mask_structure}": N:M prunes the same share of every module; leave it '
            f'out, or set mask_structure "{UNSTRUCTURED}" and a sparsity'
        )
    if solver != "sparsegpt":
        idle["block_size",] = f"beside solver: {solver}; leave it out, or set solver: sparsegpt"
    if solver != "alps":
        idle["iterations",] = f"beside solver: {solver}; leave it out, or set solver: alps"
    if solver in ("alps", "keep"):
        idle["refit",] = (
            f"beside solver: {solver}, which always refits the kept weights; leave it out"
        )
    if not settings.refits and solver != "none":
        idle["refit_steps",] = (
            f"beside solver: {solver} without a refit; leave it out, or set refit: true"
        )
    if not settings.fits_weights:
        why = f"beside solver: {solver} without refit, quantization or reconstruct: dense, where no Hessian is inverted"
        idle["dampening_frac",] = f"{why}; leave it out, or set refit: true"
    if not settings.fits_weights and solver == "magnitude":
        why = "beside solver: magnitude without refit, quantization or reconstruct: dense, which reads no activations"
        for name in ("prompt_weight", "trace_weight", "answer_weight", "trace_weighting"):
            idle["calibration", name] = f"{why}; leave it out, or set another solver"
        for name in ("experts", "expert_floor"):
            idle[name,] = f"{why}; leave it out, or set another solver"
    if settings.order == "layer":
        why = "beside order: layer (or preset: paper), which calibrates each expert on all tokens"
        idle["experts",] = idle["expert_floor",] = f"{why}; leave it out, or set order: auto"
    elif settings.experts == "all":
        idle["expert_floor",] = (
            "beside experts: all, which gives each expert every token; leave it out"
        )
    if all(
        name in settings.model_fields_set or (name,) in idle for name in PRESETS[settings.preset]
    ):
        idle["preset",] = (
            f"beside {', '.join(PRESETS[settings.preset])}, which are all that it sets; leave it out"
        )
    return idle


def idle_activations(settings: PruningSettings, calibration: CalibrationBudget) -> Idle:
    """Of what an entry sets about the bits of activations."""
    quantization, why = settings.quantization, ""
    if quantization is None:
        return {}
    if not settings.prunes:
        why = (
            "beside solver: none: a run that only quantizes does not measure it; leave it out, and run rac activations on the "
            "result"
        )
    elif settings.storage == "dense":
        why = "beside storage: dense: a sparse checkpoint records it only if it is packed; leave it out, or set storage: packed"
    elif not quantization.has_integers:
        why = "beside weights that are floats: activations are rounded for integers only; leave it out, or set scheme: W8A16"
    elif not calibration.parts("traces"):
        why = _NO_TRACES
    elif not calibration.held_out_tokens:
        why = "beside calibration.held_out_tokens: 0, since it is measured on held-out traces; leave it out, or hold some out"
    return {("quantization", "int8_activation_limit"): why} if why else {}


def idle_recovery(settings: RecoverySettings | None, where: Path = ()) -> Idle:
    """Of what is set about recovery; `where` is its place in an entry."""
    if settings is None:
        return {}
    if not settings.generic_share:
        return {(*where, "generic"): "beside generic_share: 0; leave it out, or set a share"}
    return dict(_idle_in_text((*where, "generic"), settings.generic))


def idle_calibration(traces: TraceSettings, calibration: CalibrationBudget) -> Idle:
    """Of what an entry sets about traces and calibration."""
    idle = dict(_idle_in_mixture(calibration))
    sampled, asked = calibration.parts("traces"), calibration.parts("traces", "prompts")
    if not asked:
        idle["traces",] = (
            "beside a mixture without traces and prompts; leave it out, or give them a share"
        )
        return idle
    idle.update(_idle_stores(traces, sampled))
    if traces.engine is None:
        idle["traces", "retry_failed"] = (
            "without traces.engine, since only what a server failed to complete is tried again; leave it out, or set an engine"
        )
    if not sampled:
        idle["traces", "engine"] = idle["traces", "retry_failed"] = _NO_TRACES
    if not any(part.name is None for part in asked):
        idle["traces", "problems"] = (
            "since every part of the mixture names its own problems; leave it out"
        )
    for name in traces.sources:
        if Part("traces", name) not in asked and Part("prompts", name) not in asked:
            idle["traces", "sources", name] = (
                f"unless the mixture names it; add traces:{name} to calibration.mixture"
            )
    for where, group, parts in _groups(traces, asked):
        of_traces = [traces.named(part.name) for part in parts if part.kind == "traces"]
        if not parts:
            idle[where] = "since every named source of the mixture has its own; leave it out"
        elif isinstance(group, ProblemSource):
            idle.update(
                {(*where, name): why for name, why in _idle_in_problems(group, bool(of_traces))}
            )
        elif isinstance(group, SamplingSettings):
            idle.update(
                {
                    (*where, name): why
                    for name, why in _idle_in_sampling(group, traces, bool(of_traces))
                }
            )
        else:
            idle.update({(*where, name): why for name, why in _idle_in_selection(group, of_traces)})
            if not of_traces:
                idle[where] = _NO_TRACES
    return idle


def _groups(
    traces: TraceSettings, asked: list[Part]
) -> Iterator[tuple[Path, ProblemSource | SamplingSettings | SelectSettings, list[Part]]]:
    """Each group of settings with where it is, and the parts of the mixture that it counts for."""
    sources = {part: traces.sources.get(part.name or "") for part in asked}
    plain = [part for part in asked if part.name is None]
    if plain:
        yield ("traces", "problems"), traces.problems, plain
    for name in ("sampling", "select"):
        inherit = [
            part
            for part, source in sources.items()
            if source is None or getattr(source, name) is None
        ]
        yield ("traces", name), getattr(traces, name), inherit
    for key, source in traces.sources.items():
        parts = [part for part in asked if part.name == key]
        for name in ("problems", "sampling", "select"):
            if parts and (group := getattr(source, name)) is not None:
                yield ("traces", "sources", key, name), group, parts


def _idle_stores(traces: TraceSettings, sampled: list[Part]) -> Idle:
    idle = Idle()
    if not any(part.name is None for part in sampled):
        idle["traces", "store"] = (
            "since every part of the mixture with traces has its own store; leave it out, or set "
            "traces.sources.<name>.store"
            if sampled
            else _NO_TRACES
        )
    named = {part.name: traces.sources.get(part.name or "") for part in sampled}
    inherit = [
        name for name, source in named.items() if source is None or source.allow_off_policy is None
    ]
    no_store = "without a store: a default store always holds the model's own traces; leave it out, or name a store"
    if not any(traces.named(name).store for name in inherit):
        idle["traces", "allow_off_policy"] = no_store if sampled else _NO_TRACES
    for name, source in traces.sources.items():
        where = ("traces", "sources", name)
        if name not in named:
            idle[*where, "store"] = idle[*where, "allow_off_policy"] = (
                f"beside a mixture without traces:{name}; leave it out, or give traces:{name} a share"
            )
        elif source.store is None:
            idle[*where, "allow_off_policy"] = no_store
    return idle


def _idle_in_problems(problems: ProblemSource, of_traces: bool) -> Iterator[tuple[str, str]]:
    if problems.is_generator or problems.is_file:
        yield (
            "split",
            f"beside source: {problems.source}, which is no Hugging Face dataset; leave it out",
        )
    if not of_traces:
        yield "answer_column", _NO_TRACES
        yield "max_prompt_tokens", _NO_TRACES


def _idle_in_sampling(
    sampling: SamplingSettings, traces: TraceSettings, of_traces: bool
) -> Iterator[tuple[str, str]]:
    if sampling.template == "none":
        yield "thinking", "beside template: none, which uses no chat template; leave it out"
    if sampling.temperature == 0:
        yield (
            "top_p",
            "beside temperature: 0, which is greedy; leave it out, or set a temperature above 0",
        )
        yield (
            "top_k",
            "beside temperature: 0, which is greedy; leave it out, or set a temperature above 0",
        )
    elif sampling.top_k == 1:
        yield (
            "temperature",
            "beside top_k: 1, which is greedy; leave top_k out, or set temperature: 0 in its place",
        )
        yield "top_p", "beside top_k: 1, which is greedy; leave top_k out"
    if traces.engine is not None:
        yield "batch_size", "beside traces.engine; leave it out, or set traces.engine.concurrency"
    if not of_traces:
        yield from ((name, _NO_TRACES) for name in _OF_COMPLETIONS)


def _idle_in_selection(
    select: SelectSettings, of_traces: list[TraceSettings]
) -> Iterator[tuple[str, str]]:
    if select.keeps_all:
        yield (
            "least_share",
            "without a selection, which all traces pass; leave it out, or select, such as finished: true",
        )
    if select.finished:
        yield (
            "repeated_tails",
            "beside finished: true, which keeps no completion that was cut; leave one of them out",
        )
    if any(one.allow_off_policy for one in of_traces):
        return  # the store may hold what was sampled in other ways
    samples = max((one.sampling.samples_per_problem for one in of_traces), default=1)
    if select.per_problem is not None and select.per_problem >= samples:
        yield (
            "per_problem",
            f"beside sampling.samples_per_problem={samples}; leave it out, or sample each more often",
        )
    longest = max((one.sampling.max_new_tokens for one in of_traces), default=1)
    if select.max_tokens is not None and select.max_tokens >= longest:
        yield "max_tokens", f"beside sampling.max_new_tokens={longest}; leave it out, or lower it"


def _idle_in_mixture(calibration: CalibrationBudget) -> Iterator[tuple[Path, str]]:
    traces, generic = calibration.parts("traces"), calibration.parts("generic")
    prompts = calibration.parts("prompts")
    if isinstance(calibration, CalibrationSettings):
        if not traces and not (prompts and generic):
            alike = "beside a mixture whose tokens all weigh the same; leave it out, or give traces a share"
            yield ("calibration", "prompt_weight"), alike
            yield ("calibration", "trace_weight"), alike
        if not traces:
            yield ("calibration", "answer_weight"), _NO_TRACES
            yield ("calibration", "trace_weighting"), _NO_TRACES
    if not traces:
        yield ("calibration", "held_out_tokens"), _NO_TRACES
    if Part("generic") not in generic:
        yield (
            ("calibration", "generic"),
            "beside a mixture without the part generic; leave it out, or give it a share",
        )
    else:
        yield from _idle_in_text(("calibration", "generic"), calibration.generic)
    for name, text in calibration.texts.items():
        if Part("generic", name) not in generic:
            yield (
                ("calibration", "texts", name),
                f"unless the mixture names it; add text:{name} to calibration.mixture",
            )
        else:
            yield from _idle_in_text(("calibration", "texts", name), text)


def _idle_in_text(where: Path, text: GenericText) -> Iterator[tuple[Path, str]]:
    if not text.has_columns:
        yield (
            (*where, "column"),
            f"beside source: {text.source}, which has no columns; leave it out",
        )
    if not text.is_dataset:
        for name in ("split", "config"):
            yield (
                (*where, name),
                f"beside source: {text.source}, which is no Hugging Face dataset; leave it out",
            )
