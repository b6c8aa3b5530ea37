"""Our modifiers' calibration: the set that every modifier of a recipe runs on, and the modifier that brings no more than that."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, Self

import torch
from llmcompressor.core import CompressionSession, State, active_session
from llmcompressor.modifiers import Modifier
from pydantic import PrivateAttr, SerializerFunctionWrapHandler, model_serializer, model_validator
from transformers import AutoTokenizer, PreTrainedModel

from rac_modifier.calibration.calibration_set import CalibrationSet, build_calibration_set
from rac_modifier.calibration.loader import CalibrationLoader
from rac_modifier.checkpoint.saving import SavePlan, save_with_record
from rac_modifier.errors import RacError
from rac_modifier.evaluation.run_divergence import RunDivergence
from rac_modifier.llmcompressor.oneshot_arguments import (
    check_arguments,
    find_oneshot,
    given_tokenizer,
)
from rac_modifier.llmcompressor.pipeline import SessionRun, put_in_place, take_away
from rac_modifier.llmcompressor.recovery_stage import RecoveryStage, before_sampling
from rac_modifier.llmcompressor.report import strict_json
from rac_modifier.llmcompressor.resume import made_with
from rac_modifier.llmcompressor.run import Run
from rac_modifier.llmcompressor.targets import check_autoround
from rac_modifier.llmcompressor.trained_codes import LaterCodes
from rac_modifier.model_tools import accelerator, streamed_to_accelerator
from rac_modifier.platform import keep_freed_memory
from rac_modifier.processes import Processes, present_processes
from rac_modifier.sampling.model_identity import model_fingerprint
from rac_modifier.settings.entries import CalibrationEntry

# Fields of upstream's Modifier are its state. Of those it sets two itself when it reads a recipe.
_UPSTREAM_STATE = Modifier.model_fields.keys()
_SET_BY_UPSTREAM = {"index", "group"}


class CalibratingModifier(CalibrationEntry, Modifier):
    """Bring the calibration set of a recipe, for itself and for every other modifier that calibrates."""

    _processes: Processes = PrivateAttr(default_factory=Processes)
    _calibration: CalibrationSet | None = PrivateAttr(default=None)
    _share: CalibrationLoader | None = PrivateAttr(default=None)  # of this process
    _given_tokenizer: Any = PrivateAttr(default=None)
    _session: CompressionSession | None = PrivateAttr(default=None)
    _divergence: RunDivergence | None = PrivateAttr(default=None)
    _measured: dict[str, Any] = PrivateAttr(default_factory=dict)
    _recovery: RecoveryStage | None = PrivateAttr(default=None)
    _recovered: dict[str, Any] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _upstream_state_is_not_set(self) -> Self:
        for name in sorted(self.model_fields_set & _UPSTREAM_STATE - _SET_BY_UPSTREAM):
            raise RacError(
                f"{name}: {getattr(self, name)!r} has no effect in {type(self).__name__}; leave it out"
            )
        return self

    @model_serializer(mode="wrap")
    def _only_what_counts(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Dump the settings of the entry, without upstream's state: what a recipe can set."""
        dump = super()._only_what_counts(serialize)
        return {name: value for name, value in dump.items() if name not in _UPSTREAM_STATE}

    def use_calibration_set(self, calibration: CalibrationSet) -> None:
        """Calibrate on a set that was built elsewhere, instead of the recipe's."""
        self._calibration = calibration

    @property
    def calibration_set(self) -> CalibrationSet:
        """Return what was sampled or given, once the modifier is initialized."""
        assert self._calibration is not None
        return self._calibration

    @property
    def known_share(self) -> CalibrationLoader | None:
        """Return this process's part of the calibration set; None while it has still to be sampled."""
        if self._share is None and self._calibration is not None:
            return self._calibration.loader.share(self._processes.rank, self._processes.count)
        return self._share

    def other_modifiers(self, *, later: bool = False) -> list[Modifier]:
        """Return the recipe's other modifiers; with `later` only those that run after this one."""
        modifiers = list(active_session().lifecycle.recipe.modifiers)
        place = next((i for i, modifier in enumerate(modifiers) if modifier is self), -1)
        return modifiers[place + 1 :] if later else [m for m in modifiers if m is not self]

    def check_run(self, state: State, *, prunes: bool) -> None:
        """Refuse what cannot work, before anything is sampled.

        Raises:
            RacError: several processes that do not share this recipe, a second such modifier, a dataset or other arguments of
                `oneshot` that would have no effect, an output folder that is in use, or AutoRound with zero points.
        """
        name, others = type(self).__name__, self.other_modifiers()
        check_autoround(others)
        self._processes = present_processes()
        alone = not any(modifier.requires_calibration_data for modifier in others)
        if self._processes.count > 1 and not (prunes and alone):
            beside = ", ".join(type(m).__name__ for m in others) or "nothing"
            raise RacError(
                f"{name} beside {beside} runs in one process, and torchrun started {self._processes.count}: other "
                "modifiers would calibrate on this process's part of the data alone; start it without torchrun"
            )
        if isinstance(state.data.calib, CalibrationLoader):
            calibrating = [type(m).__name__ for m in others if isinstance(m, CalibratingModifier)]
            if name in calibrating:
                raise RacError(
                    f"the recipe has two {name}; write one, with targets that cover both"
                )
            raise RacError(
                f"{name} beside {calibrating[0]}, which calibrates the whole recipe: leave {name} out"
            )
        if (oneshot := find_oneshot()) is not None:
            check_arguments(oneshot, name, prunes=prunes)
            model = state.model.config._name_or_path
            self._given_tokenizer = given_tokenizer(oneshot, self.tokenizer, model)
        if state.data.calib is not None:
            raise RacError(
                f"the session was given calibration data, and {name} brings its own: leave calib_data out, "
                "or name the data in the recipe (traces.problems, calibration.generic)"
            )

    def prepare(self, state: State, *, quantizes: bool) -> None:
        """Sample and mix the calibration set, measure the dense model, and prepare recovery if the recipe asks for it.

        `quantizes` says whether recovery trains weights through codes.
        """
        model, recover, oneshot = state.model, self.recover, find_oneshot()
        text = before_sampling(
            model, lambda: self._load_tokenizer(model), recover, self._processes, quantizes
        )
        self._build_calibration(model, recover.reserved_tokens if recover else 0)
        if recover is not None:
            keep = oneshot is not None and oneshot.output_dir is not None
            reserved = self.calibration_set.reserved
            self._recovery = RecoveryStage(
                model, reserved, recover, keep, self._processes, quantizes, text
            )

    def _build_calibration(self, model: PreTrainedModel, reserved_tokens: int) -> None:
        """Use the calibration set that was given, or sample and mix it; traces are reserved for training."""
        keep_freed_memory()
        processes = self._processes
        if self._calibration is None:
            self._calibration = build_calibration_set(
                model,
                self._load_tokenizer(model),
                self.traces,
                self.calibration,
                reserved_tokens=reserved_tokens,
                processes=processes,
            )
        loader = self._calibration.loader
        if len(set(processes.from_all(loader.sha256() if processes.count > 1 else ""))) > 1:
            raise RacError(
                f"the {processes.count} processes were given different calibration sets; give all of them the same"
            )
        self._share = loader.share(processes.rank, processes.count)
        off_policy = self.traces.allow_off_policy
        measures = processes.from_first(bool(self._calibration.held_out) and not off_policy)
        with streamed_to_accelerator(model) if measures else contextlib.nullcontext():
            if processes.is_first:
                self._divergence = RunDivergence(model, self._calibration, off_policy=off_policy)
            processes.wait()

    def calibrate_session(self, state: State, run: Run | None = None) -> None:
        """Calibrate the session on our set from here on; `run` is this modifier's, where it prunes."""
        self._session = active_session()
        assert self._share is not None
        state.data.calib = self._share
        modifier = None if run is None else self
        identity = self.calibration_set.identity()
        put_in_place(self._session, SessionRun(self._share, modifier, run, identity))

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        """Take the pipeline away, and measure the result once every modifier of the recipe has run.

        The session's next reset finalizes a run that failed; there is nothing to measure then.
        """
        if self._session is not None and take_away(self._session) and self.ended_:
            self.after_pruning(state.model)
            if self._divergence is not None:
                self._measured = self._divergence.measure(state.model)
            self._processes.wait()  # the first one measures
        self._divergence = None
        return True

    def after_pruning(self, model: PreTrainedModel) -> None:
        """Do what follows the recipe's modifiers, before the model is measured."""

    def about_run(self, model: PreTrainedModel) -> dict[str, Any]:
        """Return what the weights of a run depend on, as far as it is known before sampling.

        The source of the traces is left out: the calibration set shows whether they are the same.
        """
        return {
            "recipe": self.model_dump(mode="json", exclude={"traces", "tokenizer"}),
            "model": model_fingerprint(model),
            **made_with(accelerator() or torch.device("cpu")),
        }

    def run_record(self) -> dict[str, Any]:
        """Return the run record's entries about the settings and the calibration set."""
        return {
            "seed": f"{self.traces.sampling.seed} for sampling, {self.calibration.seed} for the mixture",
            "modifier": self.model_dump(mode="json"),
            **({"processes": self._processes.count} if self._processes.count > 1 else {}),
            **self.calibration_set.as_dict(),
            "divergence": self._measured,
            **({"recovery": self._recovered} if self._recovered else {}),
        }

    @property
    def tokenizer_name(self) -> str | None:
        """Return the path or id of the tokenizer that the recipe or `oneshot` names; None for the model's own."""
        return self.tokenizer or getattr(self._given_tokenizer, "name_or_path", None) or None

    def _load_tokenizer(self, model: Any) -> Any:
        if self._given_tokenizer is not None:
            return self._given_tokenizer
        source = self.tokenizer or model.config._name_or_path
        try:
            return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise RacError(
                f"no tokenizer could be loaded from {source!r} ({error}); name one in the recipe (tokenizer: path or id)"
            ) from error


class ReasoningAwareCalibrationModifier(CalibratingModifier):
    """Calibrate llm-compressor's own modifiers; `CalibrationEntry` says what it does and which settings it has."""

    _codes: LaterCodes | None = PrivateAttr(default=None)

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """Check that some modifier calibrates, then sample and mix the calibration set."""
        self.check_run(state, prunes=False)
        check_stands_first(active_session().lifecycle.recipe.modifiers)
        if not any(modifier.requires_calibration_data for modifier in self.other_modifiers()):
            others = ", ".join(type(m).__name__ for m in self.other_modifiers()) or "nothing else"
            raise RacError(
                f"ReasoningAwareCalibrationModifier calibrates nothing: the recipe has {others}; add a modifier that "
                "calibrates, such as GPTQModifier or AWQModifier"
            )
        if self.recover is not None:
            self._codes = LaterCodes(self.other_modifiers(), state.model)
        self.prepare(state, quantizes=True)
        save_with_record(state.model, self._save_plan)
        self.calibrate_session(state)
        return True

    def after_pruning(self, model: PreTrainedModel) -> None:
        """Train the codes, where the recipe asks for recovery."""
        if self._recovery is not None and self._codes is not None:
            self._recovered = self._recovery.run(model, {}, self._codes.quantized())

    def _save_plan(self) -> SavePlan:
        def prepare(model: PreTrainedModel, save_compressed: bool) -> None:
            if self._codes is not None and save_compressed:
                self._codes.compress()

        others = [m for m in self.other_modifiers() if m.requires_calibration_data]
        method = ", ".join(type(modifier).__name__ for modifier in others)
        return SavePlan(
            tokenizer=self.tokenizer_name,
            prepare=prepare,
            after=[] if self._recovery is None else [self._recovery.remove],
            record=strict_json({"method": method, **self.run_record()}),
        )


def check_stands_first(modifiers: Sequence[Modifier]) -> None:
    """Refuse a recipe whose ReasoningAwareCalibrationModifier is not the first modifier.

    Raises:
        RacError: naming those before it.
    """
    names = [type(modifier).__name__ for modifier in modifiers]
    ours = ReasoningAwareCalibrationModifier.__name__
    if ours in names[1:]:
        before = ", ".join(names[: names.index(ours)])
        raise RacError(
            f"{ours} stands behind {before}, which changes the model before its traces are taken; write it first"
        )
