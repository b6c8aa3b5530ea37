"""Adapt llm-compressor: importing this package makes our modifiers known to its recipes.

The registered classes are stand-ins that import a modifier's module when a recipe names it, so any
module of this package can be imported first.
"""

import importlib

from llmcompressor.modifiers import Modifier, ModifierFactory

# The module of each modifier, by the name that a recipe uses.
MODULES = {
    "ReasoningAwareSparseGPTModifier": "rac_modifier.llmcompressor.pruning_modifier",
    "ReasoningAwareCalibrationModifier": "rac_modifier.llmcompressor.calibration_modifier",
}


def _stand_in(name: str, module: str) -> type[Modifier]:
    """Return a class whose call makes the modifier; `ModifierFactory` takes classes."""

    class StandIn(Modifier):
        def __new__(cls, **settings: object) -> Modifier:  # type: ignore[misc]
            modifier: Modifier = getattr(importlib.import_module(module), name)(**settings)
            return modifier

    return StandIn


for _name, _module in MODULES.items():
    ModifierFactory.register(_name, _stand_in(_name, _module))
