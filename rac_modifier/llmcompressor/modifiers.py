"""Our llm-compressor modifiers; importing this registers them, and puts our pipelines in their registry places."""

from llmcompressor.modifiers import ModifierFactory

import rac_modifier.llmcompressor.pipeline  # noqa: F401
from rac_modifier.llmcompressor.calibrating_modifier import CalibratingModifier
from rac_modifier.llmcompressor.calibration_modifier import ReasoningAwareCalibrationModifier
from rac_modifier.llmcompressor.pruning_modifier import ReasoningAwareSparseGPTModifier

# By the name that a recipe uses.
MODIFIERS: dict[str, type[CalibratingModifier]] = {
    "ReasoningAwareSparseGPTModifier": ReasoningAwareSparseGPTModifier,
    "ReasoningAwareCalibrationModifier": ReasoningAwareCalibrationModifier,
}
for _name, _class in MODIFIERS.items():
    ModifierFactory.register(_name, _class)
