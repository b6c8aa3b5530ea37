"""Choose the modules to prune, and the pattern of each.

A pattern is the recipe's for all modules, a share of an `allocation`, or the zeros that a
model has already. Shares are of unstructured patterns. Each module gets a number of weights
to prune; the numbers add up to floor(all weights * sparsity).
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

ROUTERS = (r"re:.*\.gate$", r"re:.*router.*", r"re:.*\.shared_expert_gate$")
_AGREEMENT = 1e-3  # between the mean of a list that names every module and the sparsity
_LEAST_ZEROS = 0.05  # share of zeros of a sparse module; rounding makes a few
_2OF4 = Pattern.n_of_m(2, 4)


def find_targets(
    model: PreTrainedModel, targets: list[str], ignore: list[str], pattern: Pattern | None
) -> dict[torch.nn.Module, str]:
    """Return the linear modules to prune, in model order, with their names.

    The output head, often tied to the embedding, and router gates are left out unless
    `targets` has their exact names. `targets` and `ignore` are class names, module names,
    or regular expressions after "re:", as in llm-compressor.

    Raises:
        RacError: nothing matches, or a match is not a linear layer with a floating-point
            weight of a fitting shape.
    """
    head = model.get_output_embeddings()
    protected = {module for _, module in match_named_modules(model, list(ROUTERS))} | {head}
    targeted: dict[torch.nn.Module, str] = {}
    for name, module in match_named_modules(model, targets, ignore):
        if module in protected and name not in targets:
            continue
        if not isinstance(module, torch.nn.Linear):
            if any(t in (name, type(module).__name__) for t in targets):
                raise RacError(
                    f"targets name {name}, a {type(module).__name__}; only Linear layers are pruned"
                )
            continue
        if not module.weight.is_floating_point():
            raise RacError(
                f"{name} has a {module.weight.dtype} weight; prune the model before it is quantized"
            )
        if pattern is not None:
            pattern.check_shape(name, *module.weight.shape)
        targeted[module] = name
    linears = [name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    example = ", ".join(linears[:3]) or "no Linear at all"
    has = f"of this {type(model).__name__}; it has, for example, {example}"
    if not targeted:
        raise RacError(f"targets {targets} with ignore {ignore} match no linear layer {has}")
    for setting, patterns in {"targets": targets, "ignore": ignore}.items():
        for name in patterns:
            matched = any(True for _ in match_named_modules(model, [name]))
            if not matched and not _has_merged_experts(model):
                raise RacError(
                    f"{setting}: {name!r} has no effect, since it matches no module {has}"
                )
    if head in targeted and model.get_input_embeddings().weight is head.weight:
        raise RacError(
            f"{targeted[head]} shares its weight with the input embedding, so pruning it "
            "prunes the embedding; leave it out of targets, or load the model with "
            "tie_word_embeddings=False"
        )
    return targeted


def _has_merged_experts(model: PreTrainedModel) -> bool:
    """Return whether experts are one module, as transformers loads them."""
    experts = [module for name, module in model.named_modules() if name.endswith(".experts")]
    return any(
        not any(isinstance(child, torch.nn.Linear) for child in module.modules())
        for module in experts
    )


def patterns_of(
    entry: PruningSettings, model: PreTrainedModel, names: Mapping[torch.nn.Module, str]
) -> tuple[dict[str, Pattern], str]:
    """Return the pattern of each module by name, and all in words, "" if nothing is pruned.

    Raises:
        RacError: an allocation that cannot be kept, or with `solver: keep` a module without
            the zeros of its pattern.
    """
    pattern = entry.pattern
    if entry.solver == "keep":
        return patterns_of_zeros(names, pattern, detect=entry.mask_structure is None)
    if entry.solver == "none":
        return dict.fromkeys(names.values(), Pattern.nothing()), ""
    assert pattern is not None, "PruningSettings has checked it"
    if not entry.allocation:
        return dict.fromkeys(names.values(), pattern), pattern.describe()
    sizes = {name: module.get_parameter("weight").numel() for module, name in names.items()}
    listed: dict[str, float] = {}  # the last match of a module counts
    for target, share in entry.allocation.items():
        matched = [name for name, module in match_named_modules(model, [target]) if module in names]
        if not matched:
            raise RacError(
                f"allocation names {target!r}, which matches none of the {len(names)} "
                f"modules to be pruned, such as {next(iter(names.values()))}"
            )
        listed |= dict.fromkeys(matched, share)
    shares = allocated_shares(listed, sizes, pattern.sparsity)
    patterns = patterns_for(shares, sizes, pattern.sparsity)
    least, most = (f(patterns, key=lambda name: patterns[name].sparsity) for f in (min, max))
    logger.info(
        f"allocation: from {patterns[least].sparsity:.1%} of {least} to "
        f"{patterns[most].sparsity:.1%} of {most}, {pattern.sparsity:.4g} together"
    )
    return patterns, f"{pattern.describe()}, more in some modules than in others, as listed"


def allocated_shares(
    listed: Mapping[str, float], sizes: Mapping[str, int], sparsity: float
) -> dict[str, float]:
    """Return `listed` shares, and for others the one that makes the mean `sparsity`.

    Raises:
        RacError: no such share is possible, or a list of all modules has another mean.
    """
    total, pruned = sum(sizes.values()), sum(sizes[name] * share for name, share in listed.items())
    unlisted = total - sum(sizes[name] for name in listed)
    if not unlisted:
        if abs(pruned / total - sparsity) > _AGREEMENT:
            raise RacError(
                f"allocation names every module and prunes {pruned / total:.4f} of their "
                f"weights, but sparsity is {sparsity}: set that sparsity, or leave modules "
                "out"
            )
        return dict(listed)
    share = (total * sparsity - pruned) / unlisted
    if not 0.0 < share < 1.0:
        raise RacError(
            f"allocation leaves the {len(sizes) - len(listed)} modules that it does not "
            f"name a share of {share:.3f} to make the average {sparsity}; it must lie "
            "between 0 and 1: change the shares or the sparsity"
        )
    return {name: listed.get(name, share) for name in sizes}


def patterns_for(
    shares: Mapping[str, float], sizes: Mapping[str, int], sparsity: float
) -> dict[str, Pattern]:
    """Return unstructured patterns whose counts sum to floor(sum(sizes) * sparsity).

    Counts are the shares rounded down; those with the largest remainders are raised.

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
                f"sparsity {sparsity} leaves some of {len(sizes)} modules without a "
                "weight; lower it"
            )
        for name in able[: abs(missing)]:
            counts[name] += step
    # nextafter: a quotient that is rounded down, times the size, would give one weight less
    return {
        name: Pattern.unstructured(math.nextafter(count / sizes[name], 1.0))
        for name, count in counts.items()
    }


def patterns_of_zeros(
    names: Mapping[torch.nn.Module, str], required: Pattern | None, *, detect: bool
) -> tuple[dict[str, Pattern], str]:
    """Return the pattern of each module that `solver: keep` keeps, and all in words.

    That is `required`, if given; else with `detect` 2:4 if every module holds it, and
    otherwise an unstructured pattern with each module's share of zeros.

    Raises:
        RacError: a module that lacks the pattern asked for, or has hardly any zeros, or no
            others.
    """
    shares: dict[str, Pattern] = {}
    zeros, total, structured = 0, 0, detect
    for module, name in names.items():
        with align_module_device(module):
            weight = module.get_parameter("weight")
            count = weight.numel() - int(weight.count_nonzero())
            held = required is None or holds(weight, required)
            structured = structured and weight.shape[1] % 4 == 0 and holds(weight, _2OF4)
        if not held or not _LEAST_ZEROS <= count / weight.numel() < 1:
            lacking = f"{count:,} of its {weight.numel():,} weights are zero"
            raise RacError(
                f"{name}: solver: keep keeps the zeros that a model has, and this module "
                f"lacks them ({required.describe() if required else lacking}); leave solver out "
                "to prune it, or add it to ignore"
            )
        shares[name] = Pattern.unstructured(count / weight.numel())
        zeros, total = zeros + count, total + weight.numel()
    pattern = required or (_2OF4 if structured else None)
    if pattern is not None:
        return dict.fromkeys(shares, pattern), pattern.describe()
    return shares, f"the zeros that the model had, {100 * zeros / total:.4g} % of the weights"


def sparse_modules(
    model: torch.nn.Module, quantized: Collection[str] = (), pruned: Collection[str] = ()
) -> tuple[dict[str, torch.nn.Module], dict[str, Pattern]]:
    """Return the linear layers of a sparse model by name, and their patterns.

    Of the `quantized` modules only those that are `pruned` count, because rounding makes
    zeros too.

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
