"""Which pattern each module gets: the recipe's for all, shares of an `allocation`, or the zeros that a model has already.

Shares are of unstructured patterns: an N:M pattern fixes every module's share. Each module gets a number of weights to prune; the
numbers add up to floor(all weights * sparsity). ALPS prunes exactly that many; SparseGPT rounds down in each block of columns.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch
from compressed_tensors.utils import align_module_device, match_named_modules
from loguru import logger
from transformers import PreTrainedModel

from rac_modifier.errors import RacError
from rac_modifier.pruning.masks import holds
from rac_modifier.recovery.fixed_mask import masks_of_zeros, sparse_masks
from rac_modifier.settings.pattern import Pattern
from rac_modifier.settings.pruning import PruningSettings

_AGREEMENT = 1e-3  # between the mean of a list that names every module and the sparsity
_LEAST_ZEROS = 0.05  # share of zeros below which a module is not sparse; rounding makes a few


def patterns_of(
    entry: PruningSettings, model: PreTrainedModel, names: Mapping[torch.nn.Module, str]
) -> tuple[dict[str, Pattern], str]:
    """Return the pattern of each module by name, and all of them in words, "" where nothing is pruned.

    Raises:
        RacError: an allocation that cannot be kept, or with `solver: keep` a module without the zeros of its pattern.
    """
    pattern = entry.pattern
    if entry.solver == "keep":
        return patterns_of_zeros(names, pattern, detect=entry.mask_structure is None)
    if entry.solver == "none":
        return dict.fromkeys(names.values(), Pattern.nothing()), ""
    assert pattern is not None, "PruningSettings has checked it"
    described = pattern.describe()
    if not entry.allocation:
        return dict.fromkeys(names.values(), pattern), described
    sizes = {name: module.get_parameter("weight").numel() for module, name in names.items()}
    shares = allocated_shares(_listed(model, names, entry.allocation), sizes, pattern.sparsity)
    patterns = patterns_for(shares, sizes, pattern.sparsity)
    least, most = (f(patterns, key=lambda name: patterns[name].sparsity) for f in (min, max))
    logger.info(
        f"allocation: from {patterns[least].sparsity:.1%} of {least} to {patterns[most].sparsity:.1%} of {most}, "
        f"{pattern.sparsity:.4g} together"
    )
    return patterns, f"{described}, more in some modules than in others, as listed"


def _listed(
    model: PreTrainedModel, names: Mapping[torch.nn.Module, str], allocation: Mapping[str, float]
) -> dict[str, float]:
    """Return the shares of an allocation by module name; the last match of a module counts.

    Raises:
        RacError: a name or "re:" pattern that matches no module to be pruned.
    """
    shares: dict[str, float] = {}
    for target, share in allocation.items():
        matched = [name for name, module in match_named_modules(model, [target]) if module in names]
        if not matched:
            raise RacError(
                f"allocation names {target!r}, which matches none of the {len(names)} modules to be pruned, such as "
                f"{next(iter(names.values()))}"
            )
        shares.update(dict.fromkeys(matched, share))
    return shares


def allocated_shares(
    listed: Mapping[str, float], sizes: Mapping[str, int], sparsity: float
) -> dict[str, float]:
    """Return the `listed` shares, and for all other modules the one share that makes the mean `sparsity`.

    Raises:
        RacError: no share is possible for the other modules, or a list of all modules has another mean.
    """
    total, pruned = sum(sizes.values()), sum(sizes[name] * share for name, share in listed.items())
    others = total - sum(sizes[name] for name in listed)
    if not others:
        if abs(pruned / total - sparsity) > _AGREEMENT:
            raise RacError(
                f"allocation names every module and prunes {pruned / total:.4f} of their weights, but sparsity is {sparsity}: "
                "set that sparsity, or leave modules out, whose share is then computed"
            )
        return dict(listed)
    share = (total * sparsity - pruned) / others
    if not 0.0 < share < 1.0:
        raise RacError(
            f"allocation leaves the {len(sizes) - len(listed)} modules that it does not name a share of {share:.3f} to make the "
            f"average {sparsity}; it must lie between 0 and 1: change the shares or the sparsity"
        )
    return {name: listed.get(name, share) for name in sizes}


def patterns_for(
    shares: Mapping[str, float], sizes: Mapping[str, int], sparsity: float
) -> dict[str, Pattern]:
    """Return one unstructured pattern per module whose counts of pruned weights add up to floor(sum(sizes) * sparsity).

    Counts are the shares rounded down; those with the largest remainders are raised until the total is right.

    Raises:
        RacError: a module would keep no weight.
    """
    exact = {name: shares[name] * size for name, size in sizes.items()}
    counts = {
        name: min(max(math.floor(count), 1), sizes[name] - 1) for name, count in exact.items()
    }
    by_need = sorted(sizes, key=lambda name: counts[name] - exact[name])
    budget = math.floor(sum(sizes.values()) * sparsity)
    while missing := budget - sum(counts.values()):
        step = 1 if missing > 0 else -1
        able = [name for name in by_need[::step] if 1 <= counts[name] + step < sizes[name]]
        if not able:
            raise RacError(
                f"sparsity {sparsity} leaves some of {len(sizes)} modules without a weight; lower it"
            )
        for name in able[: abs(missing)]:
            counts[name] += step
    # nextafter: a quotient that is rounded down would give one weight less when it is multiplied by the size again
    return {
        name: Pattern.unstructured(math.nextafter(count / sizes[name], 1.0))
        for name, count in counts.items()
    }


def patterns_of_zeros(
    names: Mapping[torch.nn.Module, str], asked: Pattern | None, *, detect: bool
) -> tuple[dict[str, Pattern], str]:
    """Return what `solver: keep` keeps: one pattern per module, and all of them in words.

    That is the pattern `asked` for, if there is one; else with `detect` 2:4 if the zeros of every module have it, and otherwise
    an unstructured pattern with each module's own share of zeros.

    Raises:
        RacError: a module that lacks the pattern asked for, or has hardly any zeros, or nothing else.
    """
    two_of_four = Pattern.n_of_m(2, 4)
    shares: dict[str, Pattern] = {}
    zeros, total, structured = 0, 0, detect
    for module, name in names.items():
        with align_module_device(module):
            weight = module.get_parameter("weight")
            count = weight.numel() - int(weight.count_nonzero())
            held = asked is None or holds(weight, asked)
            structured = structured and weight.shape[1] % 4 == 0 and holds(weight, two_of_four)
        if not held or not _LEAST_ZEROS <= count / weight.numel() < 1:
            lacking = f"{count:,} of its {weight.numel():,} weights are zero"
            raise RacError(
                f"{name}: solver: keep keeps the zeros that a model has, and this module lacks them "
                f"({asked.describe() if asked else lacking}); leave solver out to prune it, or add it to ignore"
            )
        shares[name] = Pattern.unstructured(count / weight.numel())
        zeros, total = zeros + count, total + weight.numel()
    pattern = asked or (two_of_four if structured else None)
    if pattern is not None:
        return dict.fromkeys(shares, pattern), pattern.describe()
    return shares, f"the zeros that the model had, {100 * zeros / total:.4g} % of the weights"


def sparse_modules(
    model: torch.nn.Module, quantized: Collection[str] = (), pruned: Collection[str] = ()
) -> tuple[dict[str, torch.nn.Module], dict[str, Pattern]]:
    """Return the linear layers of a sparse model by name, and their patterns: 2:4 for all where all have it, else unstructured.

    Of the `quantized` modules only those that are `pruned` count: rounding makes zeros too. A quantized model may have none.

    Raises:
        RacError: no layer is sparse, nor quantized.
    """
    masks = masks_of_zeros(model, _LEAST_ZEROS) if quantized else sparse_masks(model, _LEAST_ZEROS)
    names = [mask.removesuffix(".weight") for mask in masks]
    modules = {
        name: model.get_submodule(name) for name in names if name not in quantized or name in pruned
    }
    if not modules:
        return {}, {}
    by_module = {module: name for name, module in modules.items()}
    return modules, patterns_of_zeros(by_module, None, detect=True)[0]
