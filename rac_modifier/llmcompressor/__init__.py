"""Adapt llm-compressor: importing this package makes our modifiers known to its recipes."""

from llmcompressor.modifiers import ModifierFactory

from rac_modifier.llmcompressor.calibration_modifier import ReasoningAwareCalibrationModifier
from rac_modifier.llmcompressor.pruning_modifier import ReasoningAwareSparseGPTModifier

for modifier in (ReasoningAwareCalibrationModifier, ReasoningAwareSparseGPTModifier):
    ModifierFactory.register(modifier.__name__, modifier)
