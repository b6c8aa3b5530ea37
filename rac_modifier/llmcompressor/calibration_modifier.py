"""Reasoning-aware calibration for llm-compressor's own modifiers, without pruning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmcompressor.core import State, active_session
from llmcompressor.modifiers import Modifier
from pydantic import PrivateAttr
from transformers import PreTrainedModel

from rac_modifier.checkpoint.saving import SavePlan, save_with_record
from rac_modifier.errors import RacError
from rac_modifier.llmcompressor.calibrating_modifier import CalibratingModifier
from rac_modifier.llmcompressor.later_codes import LaterCodes
from rac_modifier.llmcompressor.oneshot_arguments import find_oneshot
from rac_modifier.llmcompressor.recovery_stage import RecoveryStage, before_sampling


class ReasoningAwareCalibrationModifier(CalibratingModifier):
    """llm-compressor's side of the recipe entry `CalibrationEntry`, which says what it does."""

    _codes: LaterCodes | None = PrivateAttr(default=None)
    _recovery: RecoveryStage | None = PrivateAttr(default=None)
    _recovered: dict[str, Any] = PrivateAttr(default_factory=dict)

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
        model, oneshot = state.model, find_oneshot()
        if self.recover is not None:
            self._codes = LaterCodes(self.other_modifiers(), model)
        text = before_sampling(
            model, lambda: self._load_tokenizer(model), self.recover, quantizes=True
        )
        reserved = self.build_calibration(
            state, self.recover.reserved_tokens if self.recover else 0
        ).reserved
        if self.recover is not None:
            keep = oneshot is not None and oneshot.output_dir is not None
            self._recovery = RecoveryStage(
                model, reserved, self.recover, keep, generic=text, quantizes=True
            )
        save_with_record(state.model, self._plan)
        self.calibrate_session(state, None)
        return True

    def after_pruning(self, model: PreTrainedModel) -> None:
        """Recovery, where the recipe asks for it."""
        if self._recovery is not None and self._codes is not None:
            self._recovered = self._recovery.run(model, {}, self._codes.quantized())

    def _plan(self) -> SavePlan:
        def prepare(model: PreTrainedModel, save_compressed: bool) -> None:
            if self._codes is not None and save_compressed:
                self._codes.compress()

        others = [
            modifier for modifier in self.other_modifiers() if modifier.requires_calibration_data
        ]
        return SavePlan(
            tokenizer=self.tokenizer_name,
            prepare=prepare,
            after=[] if self._recovery is None else [self._recovery.remove],
            record={
                "method": ", ".join(type(modifier).__name__ for modifier in others),
                **self.run_record(),
                **({"recovery": self._recovered} if self._recovered else {}),
            },
        )


def check_stands_first(modifiers: Sequence[Modifier]) -> None:
    """Refuse a recipe whose ReasoningAwareCalibrationModifier is not the first modifier.

    Raises:
        RacError: naming those before it.
    """
    names = [type(modifier).__name__ for modifier in modifiers]
    own = ReasoningAwareCalibrationModifier.__name__
    if own in names[1:]:
        before = ", ".join(names[: names.index(own)])
        raise RacError(
            f"{own} stands behind {before}, which changes the model before its traces are taken; write it first"
        )
