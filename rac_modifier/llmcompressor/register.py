"""Makes our modifiers known to llm-compressor's recipes when it is imported (see on_import.py).

llm-compressor finds modifiers in its own package or by `ModifierFactory.register`, and has no entry point for others. What is
registered are stand-ins: registering imports none of our modules, so it does not matter which module is imported first.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmcompressor.modifiers import Modifier

# The module of each modifier, by the name that a recipe uses.
MODULES = {
    "ReasoningAwareSparseGPTModifier": "rac_modifier.llmcompressor.pruning_modifier",
    "ReasoningAwareCalibrationModifier": "rac_modifier.llmcompressor.calibration_modifier",
}


def register() -> None:
    """Register a stand-in for each modifier; may be called again."""
    from llmcompressor.modifiers import ModifierFactory

    for name, module in MODULES.items():
        ModifierFactory.register(name, _stand_in(name, module))


def _stand_in(name: str, module: str) -> type[Modifier]:
    """A class whose call imports the modifier and makes one; `ModifierFactory` takes only subclasses of `Modifier`."""
    from llmcompressor.modifiers import Modifier

    class StandIn(Modifier):
        def __new__(cls, **settings: object) -> Modifier:  # type: ignore[misc]
            made: Modifier = getattr(importlib.import_module(module), name)(**settings)
            return made

    return StandIn


register()
