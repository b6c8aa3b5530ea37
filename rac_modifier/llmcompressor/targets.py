"""Choose the modules to prune, and the pattern of each: the recipe's, or a model's zeros."""

from collections.abc import Mapping

import torch
from compressed_tensors.utils import match_named_modules
from loguru import logger
from transformers import PreTrainedModel

from rac_modifier.errors import RacError
from rac_modifier.recovery.checkpoint import patterns_of_zeros
from rac_modifier.settings.pattern import Pattern
from rac_modifier.settings.pruning import PruningSettings

ROUTERS = (r"re:.*\.gate$", r"re:.*router.*", r"re:.*\.shared_expert_gate$")


def find_targets(
    model: PreTrainedModel, targets: list[str], ignore: list[str], pattern: Pattern | None
) -> dict[torch.nn.Module, str]:
    """Return the linear modules to prune, in model order, with their names (RacError: not these).

    The output head, router gates and layers that no token reaches, as in a vision tower, are left
    out unless `targets` has their exact names.
    """
    head = model.get_output_embeddings()
    decoder = set(model.get_decoder().modules())
    outside: list[str] = []
    protected = {module for _, module in match_named_modules(model, list(ROUTERS))} | {head}
    targeted: dict[torch.nn.Module, str] = {}
    for name, module in match_named_modules(model, targets, ignore):
        if module in protected and name not in targets:
            continue
        if module not in decoder and name not in targets:
            outside.append(name)
            continue
        if not isinstance(module, torch.nn.Linear):
            if any(t in (name, type(module).__name__) for t in targets):
                raise RacError(f"targets: {name} is a {type(module).__name__}; name Linear layers")
            continue
        weight = getattr(module, "weight", None)  # none: codes of compressed-tensors
        if weight is None or not weight.is_floating_point():
            raise RacError(f"{name} is quantized already; start from the dense checkpoint")
        if pattern is not None:
            pattern.check_shape(name, *weight.shape)
        targeted[module] = name
    linears = [name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    example = ", ".join(linears[:3]) or "no Linear at all"
    has = f"of this {type(model).__name__}; it has, for example, {example}"
    if not targeted:
        raise RacError(f"targets {targets} with ignore {ignore} match no linear layer {has}")
    for setting, patterns in {"targets": targets, "ignore": ignore}.items():
        for name in patterns:
            matched = list(match_named_modules(model, [name]))
            if not matched and not has_merged_experts(model):
                raise RacError(f"{setting}: {name!r} has no effect: it matches no module {has}")
            linear = any(isinstance(module, torch.nn.Linear) for _, module in matched)
            holders = [n for n, module in matched if _holds_linears(module)]
            if holders and not linear:
                inside = f"re:{holders[0]}[.].*"
                raise RacError(
                    f"{setting}: {name!r} matches {holders[0]}, and not the linear layers in it; "
                    f"write {inside!r}"
                )
    if head in targeted and model.get_input_embeddings().weight is head.weight:
        raise RacError(
            f"{targeted[head]} shares its weight with the input embedding, so pruning prunes the "
            "embedding; leave it out of targets, or load the model with tie_word_embeddings=False"
        )
    if outside:
        logger.info(f"{len(outside)} layers outside of the decoder are left out, as {outside[0]}")
    return targeted


def _holds_linears(module: torch.nn.Module) -> bool:
    return any(isinstance(child, torch.nn.Linear) for child in module.modules())


def has_merged_experts(model: PreTrainedModel) -> bool:
    """Return whether experts are one module, as transformers loads them."""
    experts = [module for name, module in model.named_modules() if name.endswith(".experts")]
    return any(not _holds_linears(module) for module in experts)


def patterns_of(
    entry: PruningSettings, names: Mapping[torch.nn.Module, str]
) -> tuple[dict[str, Pattern], str]:
    """Return the pattern of each module by name, and all in words, "" if nothing is pruned."""
    if entry.solver == "keep":
        return patterns_of_zeros(names, entry.pattern, detect=entry.mask_structure is None)
    assert entry.pattern is not None, "PruningSettings has checked it"
    described = entry.pattern.describe() if entry.prunes else ""
    return dict.fromkeys(names.values(), entry.pattern), described
