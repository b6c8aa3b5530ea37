"""Importing this module makes our modifiers known to llm-compressor's recipes; `rac_modifier` does so after llm-compressor.

llm-compressor finds modifiers in its own package or by `ModifierFactory.register`, and has no entry point for others. What is
registered are stand-ins: they import a modifier's module only when a recipe names the modifier. So no module of this room is
imported here, and whichever of them is imported first, none is needed before it is complete.
"""

from __future__ import annotations

import importlib

from llmcompressor.modifiers import Modifier, ModifierFactory

# The module of each modifier, by the name that a recipe uses.
MODULES = {
    "ReasoningAwareSparseGPTModifier": "rac_modifier.llmcompressor.pruning_modifier",
    "ReasoningAwareCalibrationModifier": "rac_modifier.llmcompressor.calibration_modifier",
}


def _stand_in(name: str, module: str) -> type[Modifier]:
    """A class whose call imports the modifier and makes one; `ModifierFactory` takes only subclasses of `Modifier`."""

    class StandIn(Modifier):
        def __new__(cls, **settings: object) -> Modifier:  # type: ignore[misc]
            made: Modifier = getattr(importlib.import_module(module), name)(**settings)
            return made

    return StandIn


for _name, _module in MODULES.items():
    ModifierFactory.register(_name, _stand_in(_name, _module))
