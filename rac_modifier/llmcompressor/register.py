"""Make our modifier known to llm-compressor without importing it before the user does.

llm-compressor finds modifiers in its own package or by `ModifierFactory.register`, and has no entry point for others. So
the registration waits, if need be, until `llmcompressor` has been imported.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_PACKAGE = "llmcompressor"


def register_when_imported() -> None:
    """Register now if llmcompressor is imported already, else as soon as it has been."""
    if _PACKAGE in sys.modules and not _being_imported():
        register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def register() -> None:
    """Importing the modifier's module registers it, and the calibration pipelines with it."""
    importlib.import_module("rac_modifier.llmcompressor.modifiers")


def _being_imported() -> bool:
    spec = sys.modules[_PACKAGE].__spec__
    return bool(getattr(spec, "_initializing", False))


class _Finder(MetaPathFinder):
    """Finds llmcompressor as everybody else does, once, and wraps its loader."""

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
