"""Import a module that extends a library right after the library was imported."""

import importlib
import sys
import warnings
from importlib.abc import MetaPathFinder
from typing import Any


def import_after(trigger: str, module: str) -> None:
    """Import `module` now if `trigger` has been imported, else right after it has been."""
    finder, loaded = _ImportAfter(trigger, module), sys.modules.get(trigger)
    if loaded is not None and not getattr(loaded.__spec__, "_initializing", False):
        finder.extend()
    elif trigger not in {getattr(hook, "trigger", None) for hook in sys.meta_path}:
        sys.meta_path.insert(0, finder)


class _ImportAfter(MetaPathFinder):
    """Import `module`, which extends a library, right after `trigger` of that library is loaded."""

    def __init__(self, trigger: str, module: str) -> None:
        self.trigger, self.module = trigger, module

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname != self.trigger:
            return None
        finders = (finder for finder in sys.meta_path if not isinstance(finder, _ImportAfter))
        specs = (finder.find_spec(fullname, path, target) for finder in finders)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is None or spec.loader is None:
            return spec  # it is not installed, or not yet
        load = spec.loader.exec_module

        def load_then_import(module: Any) -> None:
            load(module)
            if module.__name__ == self.trigger:  # a loader may be shared, such as a zip file's
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                self.extend()

        spec.loader.exec_module = load_then_import  # type: ignore[method-assign]
        return spec

    def extend(self) -> None:
        """Import the module; the library works without it, so an error becomes a warning."""
        try:
            importlib.import_module(self.module)
        except Exception as error:
            text = f"{self.module} cannot extend {self.trigger} of the installed version: {error!r}"
            text += "; packed sparse checkpoints are not loaded: install what rac-modifier pins"
            warnings.warn(text, RuntimeWarning, stacklevel=2)
