"""The settings of our recipe entries, whole; those without an effect are refused, and not dumped.

A setting has an effect if it can change what is computed, written or refused. Each `idle_*`
function returns all settings without an effect, written or not: {path: why}.
"""

from __future__ import annotations

from typing import Any, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    model_serializer,
    model_validator,
)

from rac_modifier.errors import RacError
from rac_modifier.settings.calibration import CalibrationSettings, GenericText
from rac_modifier.settings.check import CONFIG, Path, without_paths, written_value
from rac_modifier.settings.problems import ProblemSource
from rac_modifier.settings.pruning import PRESETS, PruningSettings
from rac_modifier.settings.recovery import RecoverySettings
from rac_modifier.settings.traces import SelectSettings, TraceSettings

Idle = dict[Path, str]
KEEP_IDLE = {"keep_idle": True}
"""Validation context in which settings without an effect are not refused."""
_NO_TRACES = "with a mixture without traces"
_UNNAMED = "unless the mixture names it: "
# Upstream's modifiers calibrate one sequence per batch and weigh all tokens alike.
_OF_PRUNING = ("batch_tokens", "prompt_weight")


class CalibrationEntry(BaseModel):
    """Calibrate the recipe's other modifiers, such as GPTQModifier, on the model's own traces.

    The traces are sampled (or read from a store) and given to every modifier of the recipe that
    calibrates, one sequence per batch, so that no padding is counted. It changes no weight itself,
    except with `recover`: the weights are then trained through their codes once they are quantized
    (quantization-aware distillation).

        quantization_stage:
          quantization_modifiers:
            ReasoningAwareCalibrationModifier: {}
            GPTQModifier: {scheme: W4A16, ignore: [lm_head]}
    """

    model_config = ConfigDict(**CONFIG, title="ReasoningAwareCalibrationModifier")

    tokenizer: str | None = None
    """Path or id of the tokenizer; default: the model's own."""

    traces: TraceSettings = TraceSettings()
    """Where the chain-of-thought traces come from."""

    calibration: CalibrationSettings = CalibrationSettings()
    """What is calibrated on, how much of it, and what each token weighs."""

    recover: RecoverySettings | None = None
    """Train the weights after the modifiers of the recipe; default: no training."""

    def idle_settings(self) -> Idle:
        """Return the settings that have no effect with the others, and why."""
        why = "on the recipe's other modifiers, which weigh tokens alike, one sequence per batch"
        idle = idle_calibration(self.traces, self.calibration)
        idle |= {("recover", *path): why for path, why in idle_recovery(self.recover).items()}
        return {**idle, **{("calibration", name): why for name in _OF_PRUNING}}

    @model_validator(mode="after")
    def _parts_exist(self) -> Self:
        for part in self.calibration.parts("traces", "prompts"):
            self.traces.named(part.name)
        if self.recover is not None and not self.calibration.parts("traces"):
            raise RacError(
                "recover: it trains on the model's own traces, and the mixture "
                f"{self.calibration.mixture} has none; give traces a share of "
                "calibration.mixture, or leave recover out"
            )
        return self

    @model_validator(mode="after")
    def _nothing_is_idle(self, info: ValidationInfo) -> Self:
        if info.context is not KEEP_IDLE:
            refuse_idle(self, self.idle_settings())
        return self

    @model_serializer(mode="wrap")
    def _only_what_counts(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Dump settings that have an effect in plain types that can be read again."""
        dump, idle = serialize(self), set(self.idle_settings())
        if all(name in dump or (name,) in idle for name in PRESETS["quality"]):
            idle.add(("preset",))  # the dump holds all that it sets
        plain: dict[str, Any] = without_paths(dump, idle)
        return plain


class PruningEntry(CalibrationEntry, PruningSettings):
    """Prune a reasoning model on its own chain of thought (RAC, arXiv 2509.12464).

    For each linear layer W with inputs X, one-shot pruning minimises ||W X - W' X||_F^2 under the
    sparsity pattern. Here X = [X_prompt, X_decode]: prompts together with what the dense model
    itself wrote after them. The traces are sampled once (or read from a store), then the model is
    pruned, and where asked quantized, layer by layer in upstream's sequential pipeline.

        pruning_stage:
          pruning_modifiers:
            ReasoningAwareSparseGPTModifier:
              mask_structure: "2:4"
              quantization: {scheme: W4A16}   # optional
    """

    model_config = ConfigDict(**CONFIG, title="ReasoningAwareSparseGPTModifier")

    @property
    def gains_at_once(self) -> bool:
        """Return whether small problems are solved faster in a batch: SparseGPT, rounding."""
        return self.solver == "sparsegpt" or self.quantization is not None

    def idle_settings(self) -> Idle:
        """Return the settings that have no effect with the others, and why."""
        idle = idle_calibration(self.traces, self.calibration) | idle_pruning(self)
        return idle | {("recover", *path): why for path, why in idle_recovery(self.recover).items()}


ENTRIES: dict[str, type[CalibrationEntry]] = {
    "ReasoningAwareSparseGPTModifier": PruningEntry,
    "ReasoningAwareCalibrationModifier": CalibrationEntry,
}


def refuse_idle(settings: BaseModel, idle: Idle) -> None:
    """Refuse the user's settings that have no effect, all in one message (RacError)."""
    lines = []
    for path, why in idle.items():
        value = written_value(settings, path)
        if isinstance(value, BaseModel):
            value = value.model_dump(mode="json", exclude_unset=True)
        if value is not None:
            lines.append(f"{'.'.join(path)}: {value!r} has no effect {why}; leave it out")
    if lines:
        raise RacError("\n".join(lines))


def _idle(where: Path, *rules: tuple[bool, str, str]) -> Idle:
    """Return the settings below `where` that rules (holds, names, why) name."""
    return {
        (*where, *name.split(".")): why
        for holds, names, why in rules
        if holds
        for name in names.split()
    }


def idle_pruning(settings: PruningSettings) -> Idle:
    """Return what has no effect of what an entry sets about pruning itself."""
    solver, pattern, preset = settings.solver, settings.pattern, PRESETS[settings.preset]
    structured = pattern is not None and pattern.is_structured
    no_fit, by_layer = not settings.fits_weights, settings.order == "layer"
    no_data = no_fit and solver == "magnitude"
    weights = "prompt_weight"
    idle = _idle(
        (),
        (structured, "sparsity allocation", "with an N:M mask_structure"),
        (solver == "keep", "sparsity allocation", "with solver: keep: the zeros are the model's"),
        (solver == "none", "sparsity mask_structure allocation refit storage", "with solver: none"),
        (solver != "alps", "iterations", f"with solver: {solver}; alps uses it"),
        (solver in ("alps", "keep"), "refit", f"with solver: {solver}, which always refits"),
        (no_fit, "dampening_frac", f"with solver: {solver}, which fits no weight here"),
        (no_data, f"calibration.{weights} experts expert_floor", "with solver: magnitude"),
        (settings.experts == "all", "expert_floor", "with experts: all"),
        (by_layer, "experts expert_floor", "with order: layer (or preset: paper)"),
    )
    if all(name in settings.model_fields_set or (name,) in idle for name in preset):
        idle["preset",] = f"with {', '.join(preset)}, which are all that it sets"
    return idle


def idle_recovery(settings: RecoverySettings | None) -> Idle:
    """Return what has no effect of what is set about recovery."""
    if settings is None:
        return {}
    if not settings.generic_share:
        return {("generic",): "with generic_share: 0"}
    return _idle_in_text(("generic",), settings.generic)


def idle_calibration(traces: TraceSettings, calibration: CalibrationSettings) -> Idle:
    """Return what has no effect of what an entry sets about traces and calibration."""
    sampled, prompted = calibration.parts("traces"), calibration.parts("traces", "prompts")
    generic = calibration.parts("generic")
    alike = not sampled and not (calibration.parts("prompts") and generic)
    idle = _idle(
        ("calibration",),
        (alike, "prompt_weight", "with a mixture whose tokens all weigh the same"),
        (not sampled, "held_out_tokens", _NO_TRACES),
        (all(part.name for part in generic), "generic", f"{_UNNAMED}generic"),
    )
    if ("calibration", "generic") not in idle:
        idle |= _idle_in_text(("calibration", "generic"), calibration.generic)
    if not prompted:
        return {**idle, ("traces",): "with a mixture without traces and prompts"}
    named = {part.name for part in prompted}
    traced = {part.name for part in sampled}
    sources = [traces.sources.get(name or "") for name in traced]
    own_select = all(source is not None and source.select is not None for source in sources)
    is_foreign = None in traced and traces.store is not None
    served, sampling = traces.engine is not None, traces.sampling
    completions = "temperature top_p top_k max_new_tokens samples_per_problem batch_size"
    idle |= _idle(
        ("traces",),
        (not is_foreign, "allow_off_policy", "without a store, which could be another model's"),
        (None not in traced, "store", "since each named source has a store of its own"),
        (None not in named, "problems", "since each part of the mixture names its own"),
        (own_select, "select", "since each named source of the mixture has its own"),
        (not sampled, "store allow_off_policy engine select", _NO_TRACES),
    )
    idle |= _idle(
        ("traces", "sampling"),
        (sampling.template == "none", "thinking", "with template: none"),
        (sampling.top_k == 1, "temperature top_p", "with top_k: 1, which is greedy"),
        (sampling.temperature == 0, "top_p top_k", "with temperature: 0, which is greedy"),
        (served, "batch_size", "with traces.engine, which has a concurrency"),
        (not sampled, completions, _NO_TRACES),
    )
    if None in named:
        idle |= _idle_in_problems(("traces", "problems"), traces.problems, None in traced)
    if not own_select:
        idle |= _idle_in_select(("traces", "select"), traces.select, traces)
    for name, source in traces.sources.items():
        where = ("traces", "sources", name)
        if name not in named:
            idle[where] = f"{_UNNAMED}traces:{name}"
            continue
        idle |= _idle_in_problems((*where, "problems"), source.problems, name in traced)
        if name not in traced:
            idle[*where, "select"] = _NO_TRACES
        elif source.select is not None:
            idle |= _idle_in_select((*where, "select"), source.select, traces)
    return idle


def _idle_in_problems(where: Path, problems: ProblemSource, sampled: bool) -> Idle:
    no_dataset = problems.is_generator or problems.is_file
    return _idle(
        where,
        (no_dataset, "split", f"with source: {problems.source}, which is no dataset"),
        (not sampled, "answer_column max_prompt_tokens", _NO_TRACES),
    )


def _idle_in_select(where: Path, select: SelectSettings, traces: TraceSettings) -> Idle:
    longest = traces.sampling.max_new_tokens
    # a store of another model may hold longer traces
    is_longer = select.max_tokens is not None and select.max_tokens >= longest
    why = f"with sampling.max_new_tokens={longest}"
    return _idle(where, (is_longer and not traces.allow_off_policy, "max_tokens", why))


def _idle_in_text(where: Path, text: GenericText) -> Idle:
    return _idle(
        where,
        (not text.has_columns, "column", f"with source: {text.source}, without columns"),
        (not text.is_dataset, "split config", f"with source: {text.source}, no dataset"),
    )
