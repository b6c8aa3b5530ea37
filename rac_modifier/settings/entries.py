"""The settings of our recipe entries, whole; those without an effect are refused.

Refused is what a user could believe to have shaped the result, not each harmless setting.
"""

from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, model_validator

from rac_modifier.errors import RacError
from rac_modifier.settings.calibration import CalibrationSettings, TraceSettings
from rac_modifier.settings.check import CONFIG, refuse_idle
from rac_modifier.settings.pruning import PruningSettings
from rac_modifier.settings.recovery import RecoverySettings

_OF_TRACES = (
    "traces.store traces.engine traces.select traces.sampling.temperature "
    "traces.sampling.max_new_tokens traces.sampling.samples_per_problem"
)


class CalibrationEntry(BaseModel):
    """Calibrate the recipe's other modifiers, such as GPTQModifier, on the model's own traces.

    The traces are sampled (or read from a store) and given to every modifier of the recipe that
    calibrates, one sequence per batch, so that no padding is counted. It changes no weight itself.

        quantization_stage:
          quantization_modifiers:
            ReasoningAwareCalibrationModifier: {}
            GPTQModifier: {scheme: W4A16, ignore: [lm_head]}
    """

    model_config = ConfigDict(**CONFIG, title="ReasoningAwareCalibrationModifier")
    weighs_tokens: ClassVar[bool] = False

    tokenizer: str | None = None
    """Path or id of the tokenizer; default: the model's own."""

    traces: TraceSettings = TraceSettings()
    """Where the chain-of-thought traces come from."""

    calibration: CalibrationSettings = CalibrationSettings()
    """What is calibrated on, how much of it, and what each token weighs."""

    @property
    def reserved_tokens(self) -> int:
        """Return the tokens of traces that are kept for recovery."""
        return 0

    @model_validator(mode="after")
    def _parts_exist(self) -> Self:
        for part in self.calibration.parts("traces", "prompts"):
            self.traces.named(part.name)
        return self

    @model_validator(mode="after")
    def _parts_have_traces_of_their_own(self) -> Self:
        decides: Any = {"problems": {"source", "column", "config", "split"}, "sampling": True}
        parts: dict[str, str] = {}  # by what decides their traces
        for part in self.calibration.parts("traces"):
            sampled = self.traces.named(part.name).model_dump_json(include=decides)
            if other := parts.get(sampled):
                raise RacError(
                    f"{other} and {part.key} have the same traces, so one calibrates on what the "
                    "other holds out; leave one out, or give it other problems"
                )
            parts[sampled] = part.key
        return self

    @model_validator(mode="after")
    def _mixture_uses_what_is_set(self) -> Self:
        traces, calibration = self.traces, self.calibration
        sampled = {part.name for part in calibration.parts("traces")}
        prompted = {part.name for part in calibration.parts("traces", "prompts")}
        selects = [
            name is not None and name in traces.sources and traces.sources[name].select is not None
            for name in sampled
        ]
        named = "since each part of the mixture has its own"
        for name in traces.sources:
            if name not in prompted:
                raise RacError(
                    f"traces.sources.{name} has no effect unless the mixture names it, as in "
                    f"traces:{name}: 0.5; leave it out"
                )
        refuse_idle(
            self,
            (
                not self.weighs_tokens,
                "calibration.batch_tokens",
                "on the recipe's other modifiers, which get one sequence per batch",
            ),
            (
                not calibration.parts("generic"),
                "calibration.generic",
                "unless the mixture names it: generic",
            ),
            (not prompted, "traces", "with a mixture without traces and prompts"),
            (bool(prompted) and not sampled, _OF_TRACES, "with a mixture without traces"),
            (bool(sampled) and None not in sampled, "traces.store", named),
            (bool(sampled) and all(selects), "traces.select", named),
            (bool(prompted) and None not in prompted, "traces.problems", named),
            (traces.sampling.temperature == 0, "traces.sampling.top_p", "with temperature: 0"),
        )
        return self


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
    weighs_tokens: ClassVar[bool] = True

    recover: RecoverySettings | None = None
    """Train the kept weights after pruning; default: no training."""

    @property
    def reserved_tokens(self) -> int:
        """Return the tokens of traces that are kept for recovery."""
        return 0 if self.recover is None else self.recover.reserved_tokens

    @model_validator(mode="after")
    def _recovery_has_traces(self) -> Self:
        if self.recover is not None and not self.calibration.parts("traces"):
            raise RacError(
                f"recover: it trains on traces, and the mixture {self.calibration.mixture} has "
                "none; give traces a share of calibration.mixture, or leave recover out"
            )
        return self


ENTRIES: dict[str, type[CalibrationEntry]] = {
    "ReasoningAwareSparseGPTModifier": PruningEntry,
    "ReasoningAwareCalibrationModifier": CalibrationEntry,
}
