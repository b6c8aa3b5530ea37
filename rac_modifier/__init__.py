"""Prune reasoning models: calibrate on their own chain of thought, save, load and serve sparse.

Importing this package is light. It makes our modifiers known to llm-compressor's recipes, and
packed sparse checkpoints to `from_pretrained`:

    import rac_modifier
    from llmcompressor import oneshot

    oneshot("path/or/id", recipe=rac_modifier.recipe("rac_2of4"), output_dir="out")
"""

import importlib
from typing import TYPE_CHECKING, Any

from rac_modifier.errors import RacError
from rac_modifier.runtime.import_hook import import_after

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


# Each of the two modules enters itself into a registry of the library when it is imported.
import_after("llmcompressor", "rac_modifier.llmcompressor")
import_after("transformers.quantizers.auto", "rac_modifier.checkpoint.hf_quantizer")
