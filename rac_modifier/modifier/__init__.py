"""Our llm-compressor modifiers; importing this registers them, and puts our pipelines in their registry places."""

from llmcompressor.modifiers import ModifierFactory

import rac_modifier.pipelines.seam  # noqa: F401
from rac_modifier.modifier.base import CalibratingModifier
from rac_modifier.modifier.calibration import ReasoningAwareCalibrationModifier
from rac_modifier.modifier.pruning import ReasoningAwareSparseGPTModifier

# By the name that a recipe uses.
MODIFIERS: dict[str, type[CalibratingModifier]] = {
    "ReasoningAwareSparseGPTModifier": ReasoningAwareSparseGPTModifier,
    "ReasoningAwareCalibrationModifier": ReasoningAwareCalibrationModifier,
}
for _name, _class in MODIFIERS.items():
    ModifierFactory.register(_name, _class)
