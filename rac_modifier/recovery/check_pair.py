"""Check that two models are a dense one and a compressed one that was made from it."""

from __future__ import annotations

from typing import Any

import torch

from rac_modifier.errors import RacError
from rac_modifier.recovery.fixed_mask import masks_of_zeros


def check_dense(model: Any, name: str) -> None:
    """Check that the teacher is not compressed; the two models may be swapped.

    Raises:
        RacError: it is.
    """
    how = ""
    if getattr(model.config, "quantization_config", None) is not None and any(
        getattr(module, "quantization_scheme", None) is not None for module in model.modules()
    ):
        how = "quantized"
    elif sparse := masks_of_zeros(model, least_sparsity=0.05):
        linears = sum(isinstance(module, torch.nn.Linear) for module in model.modules())
        how = (
            f"sparse ({len(sparse)} of its {linears} linear layers)"
            if 2 * len(sparse) > linears
            else ""
        )
    if how:
        raise RacError(
            f"{name} is {how}, and the first model has to be the dense one, which the other is trained "
            "towards: rac recover DENSE SPARSE OUT (base_model in rac_run.json names the dense one)"
        )


def check_made_from(pruned: Any, dense: Any) -> None:
    """Check that a compressed model has the embeddings and head of its dense model.

    Raises:
        RacError: they differ.
    """
    same = type(pruned) is type(dense)
    for part in ("get_input_embeddings", "get_output_embeddings"):
        modules = [getattr(m, part)() for m in (pruned, dense)]
        if None in modules:  # a model without a head is refused later
            continue
        ours, theirs = (module.weight for module in modules)
        same = same and ours.shape == theirs.shape and torch.equal(ours.float(), theirs.float())
    if not same:
        raise RacError(
            f"the {type(pruned).__name__} to recover was not made from this {type(dense).__name__}: "
            "their embeddings or heads differ; name the dense model that was compressed (base_model in "
            "rac_run.json)"
        )
