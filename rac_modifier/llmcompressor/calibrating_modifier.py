"""What our modifiers share: the calibration set, sampled or read, mixed, and put into llm-compressor's session."""

from __future__ import annotations

import os
from typing import Any, Self

import torch
from llmcompressor.core import State, active_session
from llmcompressor.modifiers import Modifier
from pydantic import PrivateAttr, SerializerFunctionWrapHandler, model_serializer, model_validator
from transformers import AutoTokenizer

from rac_modifier.calibration.calibration_set import CalibrationSet, build_calibration_set
from rac_modifier.calibration.loader import CalibrationLoader
from rac_modifier.errors import RacError
from rac_modifier.evaluation.dense_reference import RunDivergence
from rac_modifier.model_tools import on_accelerator
from rac_modifier.settings.entries import CalibrationEntry

# Fields of upstream's Modifier are its state. Of those it sets two itself when it reads a recipe.
_UPSTREAM_STATE = Modifier.model_fields.keys()
_SET_BY_UPSTREAM = {"index", "group"}


class CalibratingModifier(CalibrationEntry, Modifier):
    """Brings the calibration set of a recipe, for itself and for every other modifier that calibrates."""

    _calibration: CalibrationSet | None = PrivateAttr(default=None)
    _divergence: RunDivergence | None = PrivateAttr(default=None)
    _moved: dict[str, Any] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _upstream_state_is_not_set(self) -> Self:
        for name in sorted(self.model_fields_set & _UPSTREAM_STATE - _SET_BY_UPSTREAM):
            raise RacError(f"{name}: {getattr(self, name)!r} has no effect in {type(self).__name__}; leave it out")
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

    def other_modifiers(self, *, later: bool = False) -> list[Modifier]:
        """Those of the recipe beside this one; with `later` only those that run after it."""
        modifiers = list(active_session().lifecycle.recipe.modifiers)
        place = next((i for i, modifier in enumerate(modifiers) if modifier is self), -1)
        return modifiers[place + 1 :] if later else [modifier for modifier in modifiers if modifier is not self]

    def check_run(self, state: State) -> None:
        """Refuse what cannot work, before anything is sampled.

        Raises:
            RacError: several processes, a second such modifier, or a dataset beside the recipe.
        """
        name = type(self).__name__
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 or (
            torch.distributed.is_available() and torch.distributed.is_initialized()
        ):
            raise RacError(
                f"{name} does not run under torchrun yet: each process would calibrate on its own part of the data; "
                "start it as one process (device_map or upstream's offloading spreads a large model)"
            )
        if isinstance(state.data.calib, CalibrationLoader):
            others = [type(m).__name__ for m in self.other_modifiers() if isinstance(m, CalibratingModifier)]
            if name in others:
                raise RacError(f"the recipe has two {name}; write one, with targets that cover both")
            raise RacError(f"{name} beside {others[0]}, which calibrates the whole recipe: leave {name} out")
        if state.data.calib is not None:
            raise RacError(
                f"oneshot was given a dataset, and {name} brings its own calibration set: leave the dataset argument out, "
                "or name the data in the recipe (traces.problems, calibration.generic)"
            )

    def calibrate_session(self, state: State) -> CalibrationSet:
        """Build the calibration set unless it was given, and put its loader into the session."""
        if self._calibration is None:
            tokenizer = self._load_tokenizer(state.model)
            self._calibration = build_calibration_set(state.model, tokenizer, self.traces, self.calibration.weighed())
        with on_accelerator(state.model):
            self._divergence = RunDivergence(state.model, self._calibration, off_policy=self.traces.allow_off_policy)
        state.data.calib = self._calibration.loader
        return self._calibration

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        """Measure the result, once every modifier of the recipe is done with it."""
        if self._divergence is not None:
            self._moved = self._divergence.measure(state.model)
            self._divergence = None
        return True

    def run_record(self) -> dict[str, Any]:
        """What the run record says of the settings and of what was calibrated on."""
        return {
            "seed": f"{self.traces.sampling.seed} for sampling, {self.calibration.seed} for the mixture",
            "modifier": self.model_dump(mode="json"),
            **self.calibration_set.as_dict(),
            "divergence": self._moved,
        }

    def _load_tokenizer(self, model: Any) -> Any:
        source = self.tokenizer or model.config._name_or_path
        try:
            return AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError) as error:
            raise RacError(
                f"no tokenizer could be loaded from {source!r} ({error}); name one in the recipe (tokenizer: path or id)"
            ) from error
