"""What a user sets about quantization: llm-compressor's own schemes.

compressed-tensors is not imported, so that a recipe is checked fast. It checks the schemes where
the modifier starts (llmcompressor/quantizer.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import model_validator

from rac_modifier.errors import RacError
from rac_modifier.settings.check import Settings, check_names

# compressed-tensors' names, compared by tests/contracts/test_compressed_tensors.py.
PRESET_SCHEMES = frozenset((
    "UNQUANTIZED", "W4A16_ASYM", "W8A8", "INT8", "W4AFP8", "FP8", "FP8_DYNAMIC", "FP8_BLOCK",
    "NVFP4A16", "NVFP4", "MXFP4A16", "MXFP4", "MXFP8A16", "MXFP8",
    "W2A4", "W2A8", "W2A16", "W3A4", "W3A8", "W3A16", "W4A4", "W4A8", "W4A16",
    "W5A8", "W5A16", "W6A8", "W6A16", "W7A8", "W7A16", "W8A16",
))  # fmt: skip
_MOST_BITS = 16
# An observer finds scales while it calibrates; here quantization/grid.py searches for them.
_WITHOUT_EFFECT = {
    "observer": "scales are searched for, and no observer runs",
    "observer_kwargs": "scales are searched for, and no observer runs",
    "zp_dtype": "zero points have as many bits as the codes, and symmetric schemes have none",
    "actorder": "dense weights are rounded by falling second moments, sparse ones in their order",
}


class QuantizationSettings(Settings):
    """How the pruned modules are quantized, as in llm-compressor's QuantizationModifier."""

    scheme: str | dict[str, list[str]] | None = None
    """A preset: W4A16, W8A16, W8A8, FP8_DYNAMIC; or a mapping from preset to targets."""

    config_groups: dict[str, dict[str, Any]] | None = None
    """Instead of a preset: compressed-tensors' schemes by name, each with its targets."""

    @model_validator(mode="after")
    def _names_are_known(self) -> QuantizationSettings:
        if (self.scheme is None) == (self.config_groups is None):
            raise RacError(
                "quantization: set either scheme or config_groups, for example scheme: W4A16"
            )
        for name in [self.scheme] if isinstance(self.scheme, str) else self.scheme or ():
            if name.upper() not in PRESET_SCHEMES:
                raise RacError(
                    f"scheme {name!r}: no preset of llm-compressor; use W4A16, W8A8, FP8_DYNAMIC, "
                    "or config_groups"
                )
        for name, targets in (self.scheme if isinstance(self.scheme, dict) else {}).items():
            check_names(targets, f"scheme.{name}")
        for name, group in (self.config_groups or {}).items():
            check_names(group.get("targets") or [], f"config_groups.{name}.targets")
            for part, arguments in group.items():
                if isinstance(arguments, Mapping):
                    _check_arguments(arguments, f"config_groups.{name}.{part}")
        return self


def _check_arguments(arguments: Mapping[str, Any], where: str) -> None:
    bits = arguments.get("num_bits")
    if bits is not None and (type(bits) is not int or not 1 <= bits <= _MOST_BITS):
        raise RacError(f"{where}.num_bits is {bits!r}; use a whole number up to {_MOST_BITS}")
    for name, why in _WITHOUT_EFFECT.items():
        if arguments.get(name):
            raise RacError(
                f"{where}.{name}: {arguments[name]!r} has no effect here: {why}; leave it out"
            )
