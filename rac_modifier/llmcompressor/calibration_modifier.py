"""Bring a recipe's calibration set: what both modifiers share, and one of them."""

import contextlib
from collections.abc import Mapping
from typing import Any, Self

from llmcompressor.core import CompressionSession, State, active_session
from llmcompressor.entrypoints.oneshot import Oneshot
from llmcompressor.modifiers import Modifier
from pydantic import PrivateAttr, SerializerFunctionWrapHandler, model_serializer, model_validator
from transformers import AutoTokenizer, PreTrainedModel

from rac_modifier.calibration.calibration_set import CalibrationSet, build_calibration_set
from rac_modifier.checkpoint.saving import SavePlan, save_with_record
from rac_modifier.distributed.processes import Processes
from rac_modifier.distributed.torchrun import present_processes
from rac_modifier.errors import RacError, refusing
from rac_modifier.llmcompressor import checks
from rac_modifier.llmcompressor.pipeline import SessionRun, install_pipeline, remove_pipeline
from rac_modifier.llmcompressor.run import Run
from rac_modifier.llmcompressor.upstream import calling_oneshot, share_on_each_machine
from rac_modifier.measure.divergence import RunDivergence
from rac_modifier.runtime.cpu_tuning import keep_freed_memory
from rac_modifier.runtime.models import onloaded_once, streamed_to_accelerator
from rac_modifier.runtime.progress import Phase
from rac_modifier.settings.entries import CalibrationEntry

# Fields of upstream's Modifier are its state; it sets two itself when it reads a recipe.
_UPSTREAM_STATE = Modifier.model_fields.keys()
_SET_BY_UPSTREAM = {"index", "group"}


class CalibratingModifier(CalibrationEntry, Modifier):
    """Bring a recipe's calibration set, for all modifiers that calibrate."""

    _oneshot: Oneshot | None = PrivateAttr(default=None)
    _processes: Processes = PrivateAttr(default_factory=Processes)
    _calibration: CalibrationSet | None = PrivateAttr(default=None)
    _given_tokenizer: Any = PrivateAttr(default=None)
    _session: CompressionSession | None = PrivateAttr(default=None)
    _divergence: RunDivergence | None = PrivateAttr(default=None)
    _measured: dict[str, Any] = PrivateAttr(default_factory=dict)
    _reap: dict[str, dict[str, Any]] = PrivateAttr(default_factory=dict)  # of `recorded_experts`

    @model_validator(mode="after")
    def _upstream_state_is_not_set(self) -> Self:
        for name in sorted(self.model_fields_set & _UPSTREAM_STATE - _SET_BY_UPSTREAM):
            raise RacError(
                f"{name}: {getattr(self, name)!r} has no effect in {type(self).__name__}; "
                "leave it out"
            )
        return self

    @model_serializer(mode="wrap")
    def _without_upstream_state(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Dump what a recipe can set, without upstream's state."""
        dump = serialize(self)
        return {name: value for name, value in dump.items() if name not in _UPSTREAM_STATE}

    def initialize(self, state: State, **kwargs: Any) -> None:
        """Initialize as every modifier; long phases are reported."""
        with Phase("preparing"):
            super().initialize(state, **kwargs)

    def finalize(self, state: State, **kwargs: Any) -> None:
        """Finalize as every modifier; long phases are reported."""
        with Phase("measuring"):
            super().finalize(state, **kwargs)

    def use_calibration_set(self, calibration: CalibrationSet) -> None:
        """Calibrate on a set that was built elsewhere, instead of the recipe's."""
        self._calibration = calibration

    @property
    def calibration_set(self) -> CalibrationSet:
        """Return what was sampled or given, once the modifier is initialized."""
        assert self._calibration is not None
        return self._calibration

    def other_modifiers(self) -> list[Modifier]:
        """Return the recipe's other modifiers."""
        return [m for m in active_session().lifecycle.recipe.modifiers if m is not self]

    def check_run(self, state: State, *, prunes: bool) -> None:
        """Refuse what cannot work, before anything is sampled (RacError)."""
        name, modifiers = type(self).__name__, self.other_modifiers()
        checks.check_autoround(modifiers)
        self._processes = present_processes()
        if self._processes.local < self._processes.count:
            share_on_each_machine()
        alone = not any(modifier.requires_calibration_data for modifier in modifiers)
        if self._processes.count > 1 and not (prunes and alone):
            names = ", ".join(type(m).__name__ for m in modifiers) or "nothing"
            raise RacError(
                f"{name} next to {names} runs in one process, not in {self._processes.count}: "
                "others calibrate on a share of the data; start without torchrun"
            )
        if any(isinstance(modifier, CalibrationEntry) for modifier in modifiers):
            raise RacError(
                f"{name} has no effect next to another modifier that calibrates the whole "
                "recipe: write one, with targets that cover both"
            )
        self._oneshot = calling_oneshot()
        if self._oneshot is not None:
            checks.check_arguments(self._oneshot, name, prunes=prunes)
            model = state.model.config._name_or_path
            self._given_tokenizer = checks.given_tokenizer(self._oneshot, self.tokenizer, model)
            if not self._processes.is_first:
                self._oneshot.model_args.processor = None  # the first rank saves it
        if state.data.calib is not None:
            raise RacError(
                f"{name} brings its own calibration data: leave calib_data out, or name the data "
                "in the recipe (traces.problems, calibration.generic)"
            )

    def prepare(self, state: State) -> None:
        """Build the calibration set, and measure the dense model."""
        model, processes = state.model, self._processes
        keep_freed_memory()
        if self._calibration is None:
            self._calibration = build_calibration_set(
                model,
                self._load_tokenizer(model),
                self.traces,
                self.calibration,
                reserved_tokens=self.reserved_tokens,
                processes=processes,
            )
        off_policy = self.traces.allow_off_policy
        held_out = [trace.sequence for trace in self._calibration.held_out]
        measures = processes.from_first(bool(held_out) and not off_policy)
        with streamed_to_accelerator(model) if measures else contextlib.nullcontext():
            if processes.is_first:
                self._divergence = RunDivergence(model, held_out, off_policy=off_policy)
            processes.wait()

    def calibrate_session(self, state: State, run: Run | None = None) -> None:
        """Calibrate the session's modifiers on our set; `run` is this one's, if it prunes."""
        self._session = active_session()
        share = self.calibration_set.loader.share(self._processes.rank, self._processes.count)
        state.data.calib = share
        install_pipeline(self._session, SessionRun(self.calibration_set, share, run, self._reap))

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        """Take the pipeline away, and measure the result of a run that has not failed."""
        if self._session is not None and remove_pipeline(self._session) and self.ended_:
            self.before_measuring(state.model)
            if self._divergence is not None:
                with streamed_to_accelerator(state.model), onloaded_once(state.model):
                    self._measured = self._divergence.measure(state.model)
                    if "kl" in self._measured:
                        self.after_measuring(state.model)
            self._processes.wait()  # the first rank measures
        self._divergence = self._oneshot = None
        return True

    def before_measuring(self, model: PreTrainedModel) -> None:
        """Run after the recipe's other modifiers, on all ranks."""

    def after_measuring(self, model: PreTrainedModel) -> None:
        """Run after the measurement on held-out traces, on the first rank."""

    def run_record(self, method: str, more: Mapping[str, Any]) -> dict[str, Any]:
        """Return the run record, with `more` entries."""
        count, seed = self._processes.count, self.traces.sampling.seed
        record: dict[str, Any] = {
            "method": method,
            "seed": f"{seed} for sampling, {self.calibration.seed} for the mixture",
            "modifier": self.model_dump(mode="json"),
            **self.calibration_set.as_dict(),
            "divergence": self._measured,
            **({"experts_removed": self._reap} if self._reap.get("kept") else {}),
            **more,
        }
        if count > 1:
            record["processes"] = count
        return record

    def _load_tokenizer(self, model: Any) -> Any:
        if self._given_tokenizer is not None:
            return self._given_tokenizer
        source = self.tokenizer or model.config._name_or_path
        problem = f"no tokenizer could be loaded from {source!r}"
        step = "name one in the recipe (tokenizer: path or id)"
        with refusing(problem, step, OSError, ValueError):
            return AutoTokenizer.from_pretrained(source, trust_remote_code=False)


class ReasoningAwareCalibrationModifier(CalibratingModifier):
    """Calibrate llm-compressor's own modifiers; `CalibrationEntry` has the settings."""

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """Check that some modifier calibrates, then build the calibration set."""
        self.check_run(state, prunes=False)
        checks.check_first(active_session().lifecycle.recipe.modifiers)
        modifiers = self.other_modifiers()
        if not any(modifier.requires_calibration_data for modifier in modifiers):
            names = ", ".join(type(m).__name__ for m in modifiers) or "nothing else"
            raise RacError(
                f"ReasoningAwareCalibrationModifier calibrates nothing: the recipe has {names}; "
                "add one that calibrates, such as GPTQModifier or AWQModifier"
            )
        self.prepare(state)
        save_with_record(state.model, self._save_plan)
        self.calibrate_session(state)
        return True

    def _save_plan(self) -> SavePlan:
        def prepare(model: PreTrainedModel, save_compressed: bool) -> None:
            for module in model.modules():  # AutoRound leaves it, and loaders refuse it
                if hasattr(module, "act_max_scale"):
                    del module.act_max_scale

        calibrating = [m for m in self.other_modifiers() if m.requires_calibration_data]
        method = ", ".join(type(modifier).__name__ for modifier in calibrating)
        return SavePlan(prepare=prepare, record=self.run_record(method, {}))
