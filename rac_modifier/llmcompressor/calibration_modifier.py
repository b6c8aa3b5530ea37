"""Reasoning-aware calibration for llm-compressor's own modifiers, without pruning."""

from __future__ import annotations

from typing import Any

from llmcompressor.core import State

from rac_modifier.checkpoint.saving import SavePlan, save_with_record
from rac_modifier.errors import RacError
from rac_modifier.llmcompressor.calibrating_modifier import CalibratingModifier


class ReasoningAwareCalibrationModifier(CalibratingModifier):
    """llm-compressor's side of the recipe entry `CalibrationEntry`, which says what it does."""

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """Check that some modifier calibrates, then sample and mix the calibration set."""
        self.check_run(state, prunes=False)
        if not any(modifier.requires_calibration_data for modifier in self.other_modifiers()):
            others = ", ".join(type(m).__name__ for m in self.other_modifiers()) or "nothing else"
            raise RacError(
                f"ReasoningAwareCalibrationModifier calibrates nothing: the recipe has {others}; add a modifier that "
                "calibrates, such as GPTQModifier or AWQModifier"
            )
        self.build_calibration(state)
        save_with_record(state.model, self._plan)
        self.calibrate_session(state, None)
        return True

    def _plan(self) -> SavePlan:
        others = [modifier for modifier in self.other_modifiers() if modifier.requires_calibration_data]
        return SavePlan(
            tokenizer=self.tokenizer_name,
            record={
                "method": ", ".join(type(modifier).__name__ for modifier in others),
                **self.run_record(),
            },
        )
