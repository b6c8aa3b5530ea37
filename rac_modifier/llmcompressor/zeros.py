"""The zeros that a model has already, and modules that lack them."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from compressed_tensors.utils import align_module_device

from rac_modifier.errors import RacError
from rac_modifier.pruning.masks import holds
from rac_modifier.recovery.fixed_mask import masks_of_zeros, sparse_masks
from rac_modifier.settings.pattern import Pattern

# A dense model has a few zeros by rounding; with fewer than this share of them a module is not sparse.
_LEAST_ZEROS = 0.05


def patterns_of_zeros(
    names: Mapping[torch.nn.Module, str], asked: Pattern | None, *, detect: bool
) -> tuple[dict[str, Pattern], str]:
    """What `solver: keep` keeps: one pattern per module, and all of them in words.

    The pattern `asked` for, if there is one. Else with `detect` 2:4 if the zeros of every module have it, and otherwise an
    unstructured pattern with each module's own share of zeros.

    Raises:
        RacError: a module that lacks the pattern asked for, or has hardly any zeros, or nothing else.
    """
    two_of_four = Pattern.n_of_m(2, 4)
    shares: dict[str, Pattern] = {}
    zeros = total = 0
    structured = detect
    for module, name in names.items():
        with align_module_device(module):
            weight: torch.Tensor = module.weight  # type: ignore[assignment]
            count = weight.numel() - int(weight.count_nonzero())
            held = asked is None or holds(weight, asked)
            structured = structured and weight.shape[1] % 4 == 0 and holds(weight, two_of_four)
        if not held or not _LEAST_ZEROS <= count / weight.numel() < 1:
            lacking = (
                asked.describe()
                if asked
                else f"{count:,} of its {weight.numel():,} weights are zero"
            )
            raise RacError(
                f"{name}: solver: keep keeps the zeros that a model has, and this module lacks them ({lacking}); "
                "leave solver out to prune it, or add it to ignore"
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
    """The linear layers of a sparse model by name, and their patterns: 2:4 for all where all have it, else unstructured.

    Of the `quantized` modules only those that are `pruned` count: rounding makes zeros too. A quantized model may have none.

    Raises:
        RacError: no layer is sparse, nor quantized.
    """
    masks = masks_of_zeros(model, _LEAST_ZEROS) if quantized else sparse_masks(model, _LEAST_ZEROS)
    names = [
        name
        for mask in masks
        if (name := mask.removesuffix(".weight")) not in quantized or name in pruned
    ]
    modules = {name: model.get_submodule(name) for name in names}
    if not modules:
        return {}, {}
    patterns, _ = patterns_of_zeros(
        {module: name for name, module in modules.items()}, None, detect=True
    )
    return modules, patterns
