"""Prune reasoning models: calibrate on their own chain of thought, save, load and serve sparse.

Importing this package is light. It makes our modifiers known to llm-compressor's recipes, and
packed sparse checkpoints to `from_pretrained`:

    import rac_modifier
    from llmcompressor import oneshot

    oneshot("path/or/id", recipe=rac_modifier.recipe("rac_2of4"), output_dir="out")
"""

import importlib
import importlib.util
import sys
import warnings
from importlib.abc import MetaPathFinder
from typing import TYPE_CHECKING, Any

from rac_modifier.errors import RacError

if TYPE_CHECKING:
    from rac_modifier.calibration.dataset import trace_dataset as trace_dataset
    from rac_modifier.checkpoint.hf_quantizer import load_model as load_model
    from rac_modifier.llmcompressor.calibration_modifier import (
        ReasoningAwareCalibrationModifier as ReasoningAwareCalibrationModifier,
    )
    from rac_modifier.llmcompressor.pruning_modifier import (
        ReasoningAwareSparseGPTModifier as ReasoningAwareSparseGPTModifier,
    )
    from rac_modifier.reasoner import reasoner_path as reasoner_path
    from rac_modifier.recovery.fixed_mask import fixed_mask as fixed_mask
    from rac_modifier.settings.recipe_files import recipe as recipe

__version__ = "0.2.0"
_LAZY = {
    "ReasoningAwareCalibrationModifier": "rac_modifier.llmcompressor.calibration_modifier",
    "ReasoningAwareSparseGPTModifier": "rac_modifier.llmcompressor.pruning_modifier",
    "fixed_mask": "rac_modifier.recovery.fixed_mask",
    "load_model": "rac_modifier.checkpoint.hf_quantizer",
    "reasoner_path": "rac_modifier.reasoner",
    "recipe": "rac_modifier.settings.recipe_files",
    "trace_dataset": "rac_modifier.calibration.dataset",
}
__all__ = ["RacError", "__version__", *_LAZY]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


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


def _import_after(trigger: str, module: str) -> None:
    """Import `module` now if `trigger` has been imported, else right after it has been."""
    finder, loaded = _ImportAfter(trigger, module), sys.modules.get(trigger)
    if loaded is not None and not getattr(loaded.__spec__, "_initializing", False):
        finder.extend()
    elif trigger not in {getattr(hook, "trigger", None) for hook in sys.meta_path}:
        sys.meta_path.insert(0, finder)


# Each of the two modules enters itself into a registry of the library when it is imported.
_import_after("llmcompressor", "rac_modifier.llmcompressor")
_import_after("transformers.quantizers.auto", "rac_modifier.checkpoint.hf_quantizer")
