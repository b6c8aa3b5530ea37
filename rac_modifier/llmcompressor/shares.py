"""How much of each module is pruned: from the recipe's `allocation` to one pattern per module.

Unstructured patterns only: an N:M pattern fixes every module's share. Each module gets a number of weights to prune; the
numbers add up to floor(all weights * sparsity). ALPS prunes exactly that many; SparseGPT rounds down in each block of columns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from compressed_tensors.utils import match_named_modules
from loguru import logger
from transformers import PreTrainedModel

from rac_modifier.errors import RacError
from rac_modifier.settings.pattern import Pattern
from rac_modifier.settings.pruning import Allocation

_AGREEMENT = (
    1e-3  # between the average of a list that names every module and the sparsity asked for
)


def describe_patterns(pattern: Pattern, allocation: Allocation | None) -> str:
    """The pattern in words; the run record lists each module's share."""
    return pattern.describe() + (
        ", more in some modules than in others, as listed" if allocation else ""
    )


def listed_patterns(
    model: PreTrainedModel,
    names: Mapping[torch.nn.Module, str],
    pattern: Pattern,
    allocation: Allocation | None,
) -> dict[str, Pattern]:
    """Patterns from shares by module name or "re:" pattern, where a module's last match counts; see `listed_shares`.

    Without such a list, the same pattern for every module.

    Raises:
        RacError: a name that matches no module to be pruned, or shares that cannot make the average.
    """
    if not allocation:
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
    sizes = module_sizes(names)
    patterns = patterns_for(listed_shares(shares, sizes, pattern.sparsity), sizes, pattern.sparsity)
    log_patterns(patterns, pattern)
    return patterns


def module_sizes(names: Mapping[torch.nn.Module, str]) -> dict[str, int]:
    """The number of weights of each module."""
    return {name: module.weight.numel() for module, name in names.items()}  # type: ignore[operator]


def log_patterns(patterns: Mapping[str, Pattern], pattern: Pattern) -> None:
    """Log the smallest and the largest share."""
    least, most = (f(patterns, key=lambda name: patterns[name].sparsity) for f in (min, max))
    logger.info(
        f"allocation: from {patterns[least].sparsity:.1%} of {least} to {patterns[most].sparsity:.1%} of {most}, "
        f"{pattern.sparsity:.4g} together"
    )


def patterns_for(
    shares: Mapping[str, float], sizes: Mapping[str, int], sparsity: float
) -> dict[str, Pattern]:
    """One unstructured pattern per module from wanted `shares`, which are rounded so that the total is exact.

    Largest remainders are rounded up until the counts add up to floor(sum(sizes) * sparsity).

    Raises:
        RacError: a module would keep no weight.
    """
    budget = math.floor(sum(sizes.values()) * sparsity)
    wanted = {name: shares[name] * size for name, size in sizes.items()}
    counts = {
        name: min(max(math.floor(count), 1), sizes[name] - 1) for name, count in wanted.items()
    }
    by_need = sorted(sizes, key=lambda name: counts[name] - wanted[name])
    left = budget - sum(counts.values())
    while left:
        step = 1 if left > 0 else -1
        able = [name for name in by_need[::step] if 1 <= counts[name] + step < sizes[name]]
        if not able:
            raise RacError(
                f"sparsity {sparsity} leaves some of {len(sizes)} modules without a weight; lower it"
            )
        for name in able[: abs(left)]:
            counts[name] += step
        left = budget - sum(counts.values())
    # nextafter: a quotient that is rounded down would give one weight less when it is multiplied by the size again
    return {
        name: Pattern.unstructured(math.nextafter(count / sizes[name], 1.0))
        for name, count in counts.items()
    }


def listed_shares(
    given: Mapping[str, float], sizes: Mapping[str, int], sparsity: float
) -> dict[str, float]:
    """The shares that are listed, and for all other modules the one share that makes the average `sparsity`.

    Raises:
        RacError: no share is possible for the other modules, or a list of all modules has another average.
    """
    total, taken = sum(sizes.values()), sum(sizes[name] * share for name, share in given.items())
    rest = total - sum(sizes[name] for name in given)
    if not rest:
        if abs(taken / total - sparsity) > _AGREEMENT:
            raise RacError(
                f"allocation names every module and prunes {taken / total:.4f} of their weights, but sparsity is {sparsity}: "
                "set that sparsity, or leave modules out, whose share is then computed"
            )
        return dict(given)
    share = (total * sparsity - taken) / rest
    if not 0.0 < share < 1.0:
        raise RacError(
            f"allocation leaves the {len(sizes) - len(given)} modules that it does not name a share of {share:.3f} to make the "
            f"average {sparsity}; it must lie between 0 and 1: change the shares or the sparsity"
        )
    return {name: given.get(name, share) for name in sizes}
