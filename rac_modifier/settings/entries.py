"""The settings of our recipe entries, whole: what the modifiers inherit and JSON Schemas show."""

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
from rac_modifier.settings.base import CONFIG, without_paths
from rac_modifier.settings.calibration import CalibrationSettings
from rac_modifier.settings.idle import (
    Idle,
    idle_activations,
    idle_calibration,
    idle_pruning,
    idle_recovery,
    refuse_idle,
)
from rac_modifier.settings.presets import PRESETS
from rac_modifier.settings.pruning import PruningSettings
from rac_modifier.settings.recovery import RecoverySettings
from rac_modifier.settings.traces import TraceSettings

KEEP_IDLE = {"keep_idle": True}
"""Validation context in which settings without an effect are not refused."""
# Upstream's modifiers calibrate one sequence per batch and weigh all tokens alike.
_OF_PRUNING = ("batch_tokens", "prompt_weight", "answer_weight", "trace_weighting")


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
        idle |= idle_recovery(self.recover, ("recover",))
        return {**idle, **{("calibration", name): why for name in _OF_PRUNING}}

    @model_validator(mode="after")
    def _names_are_known(self) -> Self:
        for part in self.calibration.parts("traces", "prompts"):
            self.traces.named(part.name)
        return self

    @model_validator(mode="after")
    def _recovery_has_traces(self) -> Self:
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
        """A dump in plain types that can be read again, without settings that have no effect."""
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
        """Whether small problems are solved faster in a batch: with SparseGPT and rounding."""
        return self.solver == "sparsegpt" or self.quantization is not None

    def idle_settings(self) -> Idle:
        """Return the settings that have no effect with the others, and why."""
        idle = idle_calibration(self.traces, self.calibration) | idle_pruning(self)
        idle |= idle_activations(self, self.calibration)
        return idle | idle_recovery(self.recover, ("recover",))


ENTRIES: dict[str, type[CalibrationEntry]] = {
    "ReasoningAwareSparseGPTModifier": PruningEntry,
    "ReasoningAwareCalibrationModifier": CalibrationEntry,
}
