"""Make our modifiers known to llm-compressor's recipes, without importing llm-compressor before the user does.

llm-compressor finds modifiers in its own package or by `ModifierFactory.register`, and has no entry point for others. If it is
not imported yet, an import hook registers them as soon as it has been. What is registered are stand-ins: registering imports
none of our modules, so it does not matter which module is imported first.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmcompressor.modifiers import Modifier

_PACKAGE = "llmcompressor"

# The module of each modifier, by the name that a recipe uses.
MODULES = {
    "ReasoningAwareSparseGPTModifier": "rac_modifier.llmcompressor.pruning_modifier",
    "ReasoningAwareCalibrationModifier": "rac_modifier.llmcompressor.calibration_modifier",
}


def register_when_imported() -> None:
    """Register now if llmcompressor is imported already, else as soon as it has been."""
    if _PACKAGE in sys.modules and not _being_imported():
        register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


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


def _being_imported() -> bool:
    spec = sys.modules[_PACKAGE].__spec__
    return bool(getattr(spec, "_initializing", False))


class _Finder(MetaPathFinder):
    """Finds llmcompressor where the ordinary finders do, once, and wraps its loader."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _PACKAGE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisterAfterwards(spec.loader)
        return spec


class _RegisterAfterwards(Loader):
    def __init__(self, loader: Loader):
        self._loader = loader

    def __getattr__(self, name: str) -> object:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        register()
