"""What our modifiers share: the checks of a run, and its calibration set, which every modifier of the recipe runs on."""

from __future__ import annotations

import contextlib
from typing import Any, Self

import torch
from llmcompressor.core import CompressionSession, State, active_session
from llmcompressor.modifiers import Modifier
from pydantic import PrivateAttr, SerializerFunctionWrapHandler, model_serializer, model_validator
from transformers import AutoTokenizer, PreTrainedModel

from rac_modifier.calibration.calibration_set import CalibrationSet, build_calibration_set
from rac_modifier.calibration.loader import CalibrationLoader
from rac_modifier.errors import RacError
from rac_modifier.evaluation.run_divergence import RunDivergence
from rac_modifier.freed_memory import keep_freed_memory
from rac_modifier.llmcompressor.finished_groups import made_with
from rac_modifier.llmcompressor.oneshot_arguments import (
    check_arguments,
    find_oneshot,
    given_tokenizer,
)
from rac_modifier.llmcompressor.pipeline import Run, put_in_place, take_away
from rac_modifier.llmcompressor.pruner import Pruner
from rac_modifier.llmcompressor.targets import check_autoround
from rac_modifier.model_tools import accelerator, streamed_to_accelerator
from rac_modifier.processes import Processes, present_processes
from rac_modifier.sampling.model_identity import model_fingerprint
from rac_modifier.settings.entries import CalibrationEntry

# Fields of upstream's Modifier are its state. Of those it sets two itself when it reads a recipe.
_UPSTREAM_STATE = Modifier.model_fields.keys()
_SET_BY_UPSTREAM = {"index", "group"}


class CalibratingModifier(CalibrationEntry, Modifier):
    """Brings the calibration set of a recipe, for itself and for every other modifier that calibrates."""

    _processes: Processes = PrivateAttr(default_factory=Processes)
    _calibration: CalibrationSet | None = PrivateAttr(default=None)
    _share: CalibrationLoader | None = PrivateAttr(default=None)  # of this process
    _given_tokenizer: Any = PrivateAttr(default=None)
    _session: CompressionSession | None = PrivateAttr(default=None)
    _divergence: RunDivergence | None = PrivateAttr(default=None)
    _measured: dict[str, Any] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _upstream_state_is_not_set(self) -> Self:
        for name in sorted(self.model_fields_set & _UPSTREAM_STATE - _SET_BY_UPSTREAM):
            raise RacError(
                f"{name}: {getattr(self, name)!r} has no effect in {type(self).__name__}; leave it out"
            )
        return self

    @model_serializer(mode="wrap")
    def _only_what_counts(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """The settings of the entry, without upstream's state: what a recipe can set."""
        dump = super()._only_what_counts(serialize)
        return {name: value for name, value in dump.items() if name not in _UPSTREAM_STATE}

    def use_calibration_set(self, calibration: CalibrationSet) -> None:
        """Calibrate on a set that was built elsewhere, in place of the recipe's."""
        self._calibration = calibration

    @property
    def calibration_set(self) -> CalibrationSet:
        """What was sampled or given; there once the modifier is initialized."""
        assert self._calibration is not None
        return self._calibration

    @property
    def known_share(self) -> CalibrationLoader | None:
        """This process's part of the calibration set; None while it has still to be sampled."""
        if self._share is None and self._calibration is not None:
            return self._calibration.loader.share(self._processes.rank, self._processes.count)
        return self._share

    def other_modifiers(self, *, later: bool = False) -> list[Modifier]:
        """Those of the recipe beside this one; with `later` only those that run after it."""
        modifiers = list(active_session().lifecycle.recipe.modifiers)
        place = next((i for i, modifier in enumerate(modifiers) if modifier is self), -1)
        return (
            modifiers[place + 1 :]
            if later
            else [modifier for modifier in modifiers if modifier is not self]
        )

    def check_run(self, state: State, *, prunes: bool) -> None:
        """Refuse what cannot work, before anything is sampled.

        Raises:
            RacError: several processes that do not share this recipe, a second such modifier, a dataset or other arguments of
                `oneshot` that would have no effect, an output folder that is in use, or AutoRound with zero points.
        """
        name = type(self).__name__
        check_autoround(self.other_modifiers())
        self._processes = present_processes()
        if self._processes.count > 1 and not (
            prunes and all(_runs_alone(m) for m in self.other_modifiers())
        ):
            beside = ", ".join(type(m).__name__ for m in self.other_modifiers())
            raise RacError(
                f"{name} beside {beside or 'nothing'} runs in one process, and torchrun started {self._processes.count}: other "
                "modifiers would calibrate on this process's part of the data alone; start it without torchrun"
            )
        if isinstance(state.data.calib, CalibrationLoader):
            others = [
                type(m).__name__
                for m in self.other_modifiers()
                if isinstance(m, CalibratingModifier)
            ]
            if name in others:
                raise RacError(
                    f"the recipe has two {name}; write one, with targets that cover both"
                )
            raise RacError(
                f"{name} beside {others[0]}, which calibrates the whole recipe: leave {name} out"
            )
        if (oneshot := find_oneshot()) is not None:
            check_arguments(oneshot, name, prunes=prunes)
            self._given_tokenizer = given_tokenizer(
                oneshot, self.tokenizer, state.model.config._name_or_path
            )
        if state.data.calib is not None:
            raise RacError(
                f"the session was given calibration data, and {name} brings its own: leave calib_data out, "
                "or name the data in the recipe (traces.problems, calibration.generic)"
            )

    def build_calibration(self, state: State, reserved_tokens: int = 0) -> CalibrationSet:
        """The calibration set: the one given, or else sampled and mixed as the recipe says, with traces reserved for training."""
        keep_freed_memory()
        if self._calibration is None:
            tokenizer = self._load_tokenizer(state.model)
            self._calibration = build_calibration_set(
                state.model,
                tokenizer,
                self.traces,
                self.calibration,
                reserved_tokens=reserved_tokens,
                processes=self._processes,
            )
        loader, processes = self._calibration.loader, self._processes
        if len(set(processes.from_all(loader.sha256() if processes.count > 1 else ""))) > 1:
            raise RacError(
                f"the {processes.count} processes were given different calibration sets; give all of them the same"
            )
        self._share = loader.share(processes.rank, processes.count)
        off_policy = self.traces.allow_off_policy
        measures = processes.from_first(bool(self._calibration.held_out) and not off_policy)
        with streamed_to_accelerator(state.model) if measures else contextlib.nullcontext():
            if processes.is_first:
                self._divergence = RunDivergence(
                    state.model, self._calibration, off_policy=off_policy
                )
            processes.wait()
        return self._calibration

    def calibrate_session(self, state: State, pruner: Pruner | None) -> None:
        """The last step of initializing: from here on the session calibrates on our set; `pruner` is this modifier or None."""
        self._session = active_session()
        assert self._share is not None
        state.data.calib = self._share
        put_in_place(self._session, Run(self._share, pruner))

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        """Take the pipeline away, and measure the result once every modifier of the recipe has run.

        The session's next reset finalizes a run that failed; there is nothing to measure then.
        """
        succeeded = self._session is not None and take_away(self._session) and self.ended_
        if succeeded:
            self.after_pruning(state.model)
        if succeeded and self._divergence is not None:
            self._measured = self._divergence.measure(state.model)
            self.after_measuring(state.model)
        if succeeded:
            self._processes.wait()  # the first one measures
        self._divergence = None
        return True

    def after_pruning(self, model: PreTrainedModel) -> None:
        """What is done with the model when every modifier of the recipe has run, before it is measured."""

    def after_measuring(self, model: PreTrainedModel) -> None:
        """What the first process measures further, of the model as it will be saved."""

    def about_run(self, model: PreTrainedModel) -> dict[str, Any]:
        """What the weights of a run depend on, as far as it is known before sampling.

        Where the traces came from is left out: the calibration set shows whether they are the same.
        """
        return {
            "recipe": self.model_dump(mode="json", exclude={"traces", "tokenizer"}),
            "model": model_fingerprint(model),
            **made_with(accelerator() or torch.device("cpu")),
        }

    def run_record(self) -> dict[str, Any]:
        """The run record's entries about the settings and the calibration set."""
        return {
            "seed": f"{self.traces.sampling.seed} for sampling, {self.calibration.seed} for the mixture",
            "modifier": self.model_dump(mode="json"),
            **({"processes": self._processes.count} if self._processes.count > 1 else {}),
            **self.calibration_set.as_dict(),
            "divergence": self._measured,
        }

    @property
    def tokenizer_name(self) -> str | None:
        """Path or id of the tokenizer that the recipe or `oneshot` names; None for the model's own."""
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


def _runs_alone(modifier: Modifier) -> bool:
    """Whether a modifier calibrates nothing, so that it does the same in each of several processes."""
    return not modifier.requires_calibration_data
