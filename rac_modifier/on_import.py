"""Import a module of ours right after a library was imported, without importing that library before the user does.

A library that finds extensions through a registry in one of its modules, and has no entry point for others, is extended
in this way: `import rac_modifier` stays light, and the order of the user's imports does not matter.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import threading
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def import_after(trigger: str, module: str) -> None:
    """Import `module` now if `trigger` has been imported, else right after it has been.

    Calling twice changes nothing. An error of `module` becomes a warning: the library that the user
    imports works without it.
    """
    if trigger in sys.modules and not _is_being_imported(trigger):
        _import(trigger, module)
    elif not any(
        isinstance(f, _Finder) and (f.trigger, f.module) == (trigger, module) for f in sys.meta_path
    ):
        sys.meta_path.insert(0, _Finder(trigger, module))


def _import(trigger: str, module: str) -> None:
    try:
        importlib.import_module(module)
    except Exception as error:
        warnings.warn(
            f"{module} cannot extend {trigger} of the installed version ({error!r}); packed sparse "
            "checkpoints are not loaded: install the versions that rac-modifier pins",
            RuntimeWarning,
            stacklevel=2,
        )


def _is_being_imported(name: str) -> bool:
    return bool(getattr(sys.modules[name].__spec__, "_initializing", False))


class _Finder(MetaPathFinder):
    """Finds `trigger` as the other finders do, and wraps its loader. Stays in place until `trigger` has been loaded."""

    def __init__(self, trigger: str, module: str) -> None:
        self.trigger, self.module = trigger, module
        self._here = threading.local()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.trigger or getattr(self._here, "searching", False):
            return None
        self._here.searching = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._here.searching = False
        if spec is not None and spec.loader is not None:  # else it is not installed, or not yet
            spec.loader = _LoadThenImport(spec.loader, self)
        return spec


class _LoadThenImport(Loader):
    """A module's own loader, and the import of another module when that one is loaded."""

    def __init__(self, loader: Loader, finder: _Finder) -> None:
        self._loader, self._finder = loader, finder

    def __getattr__(self, name: str) -> object:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        if self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)
        _import(self._finder.trigger, self._finder.module)
