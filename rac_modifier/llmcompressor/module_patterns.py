"""From the recipe's `allocation` to one pattern a module."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from compressed_tensors.utils import match_named_modules
from loguru import logger
from transformers import PreTrainedModel

from rac_modifier.calibration.loader import CalibrationLoader
from rac_modifier.errors import RacError
from rac_modifier.llmcompressor.sensitivity import TOKENS, measure_sensitivity
from rac_modifier.llmcompressor.shares import listed_shares, patterns_for, sensitive_shares
from rac_modifier.settings.pattern import Pattern
from rac_modifier.settings.pruning import Allocation


def describe_patterns(pattern: Pattern, allocation: Allocation) -> str:
    """The pattern in words; the run record lists each module's share."""
    if allocation == "uniform":
        return pattern.describe()
    how = "as listed" if isinstance(allocation, dict) else "by measured KL"
    return f"{pattern.describe()}, more in some modules than in others, {how}"


def listed_patterns(
    model: PreTrainedModel, names: Mapping[torch.nn.Module, str], pattern: Pattern, allocation: Allocation
) -> dict[str, Pattern]:
    """Patterns from shares by module name or "re:" pattern, the last match of a module counts; see `listed_shares`.

    Without such a list, the same pattern for every module.

    Raises:
        RacError: a name that matches no module to be pruned, or shares that cannot make the average.
    """
    if not isinstance(allocation, dict):
        return dict.fromkeys(names.values(), pattern)
    shares: dict[str, float] = {}
    for target, share in allocation.items():
        matched = [name for name, module in match_named_modules(model, [target]) if module in names]
        if not matched:
            raise RacError(
                f"allocation names {target!r}, which matches none of the {len(names)} modules to be pruned, such as "
                f"{next(iter(names.values()))}"
            )
        shares.update(dict.fromkeys(matched, share))
    sizes = _sizes(names)
    patterns = patterns_for(listed_shares(shares, sizes, pattern.sparsity), sizes, pattern.sparsity)
    _say(patterns, pattern)
    return patterns


def measured_patterns(
    model: PreTrainedModel, names: Mapping[torch.nn.Module, str], pattern: Pattern, loader: CalibrationLoader
) -> dict[str, Pattern]:
    """Patterns half-way to what the modules' measured KL suggests (allocation.py).

    Raises:
        RacError: see `measure_sensitivity`.
    """
    logger.info(f"allocation: kl takes {len(names) + 1} forward passes of about {TOKENS:,} tokens")
    found = measure_sensitivity(model, loader, names, pattern.sparsity)
    patterns = patterns_for(sensitive_shares(found, pattern.sparsity), _sizes(names), pattern.sparsity)
    _say(patterns, pattern)
    return patterns


def _sizes(names: Mapping[torch.nn.Module, str]) -> dict[str, int]:
    return {name: module.weight.numel() for module, name in names.items()}  # type: ignore[operator]


def _say(patterns: Mapping[str, Pattern], pattern: Pattern) -> None:
    least, most = (f(patterns, key=lambda name: patterns[name].sparsity) for f in (min, max))
    logger.info(
        f"allocation: from {patterns[least].sparsity:.1%} of {least} to {patterns[most].sparsity:.1%} of {most}, "
        f"{pattern.sparsity:.4g} together"
    )
