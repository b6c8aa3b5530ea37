"""Which modules of a model are pruned, and which modifiers may follow."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from compressed_tensors.utils import match_named_modules
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.quantization import QuantizationMixin
from transformers import PreTrainedModel

from rac_modifier.errors import RacError
from rac_modifier.settings.pattern import Pattern

# They move weights to compensate for rounding, pruned ones too (llm-compressor issue 2860).
_FILLS_ZEROS = {"GPTQModifier"}
ROUTERS = (r"re:.*\.gate$", r"re:.*router.*", r"re:.*\.shared_expert_gate$")


def find_targets(
    model: PreTrainedModel, targets: list[str], ignore: list[str], pattern: Pattern | None
) -> dict[torch.nn.Module, str]:
    """The linear modules to prune, in model order, with their names.

    The output head and router gates are left out unless `targets` contains their exact names: the head is often tied to the
    embedding, and a small change of a router's weights can select other experts. `targets` and `ignore` are matched as
    llm-compressor matches them: class names, module names, or regular expressions after "re:".

    Raises:
        RacError: nothing matches, a match is not a linear layer or has no floating-point weight, or its shape does not fit.
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
    examples = [
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)
    ][:3]
    has = f"of this {type(model).__name__}; it has, for example, {', '.join(examples) or 'no Linear at all'}"
    if not targeted:
        raise RacError(f"targets {targets} with ignore {ignore} match no linear layer {has}")
    for setting, names in {"targets": targets, "ignore": ignore}.items():
        for name in names:
            if next(
                iter(match_named_modules(model, [name])), None
            ) is None and not _has_merged_experts(model):
                raise RacError(
                    f"{setting}: {name!r} has no effect, since it matches no module {has}"
                )
    if head in targeted and model.get_input_embeddings().weight is head.weight:
        raise RacError(
            f"{targeted[head]} shares its weight with the input embedding, so pruning it prunes the embedding; "
            "leave it out of targets, or load the model with tie_word_embeddings=False"
        )
    return targeted


def _has_merged_experts(model: PreTrainedModel) -> bool:
    """Whether the experts of a layer are one module, as transformers loads them. A run splits them, and then they have names."""
    experts = [module for name, module in model.named_modules() if name.endswith(".experts")]
    return any(
        not any(isinstance(child, torch.nn.Linear) for child in module.modules())
        for module in experts
    )


def check_later_modifiers(ours: Modifier, later: Iterable[Modifier], *, quantizes: bool) -> None:
    """Refuse modifiers of the recipe after `ours` that would undo its work, before anything is sampled.

    Raises:
        RacError: naming the modifier.
    """
    for modifier in later:
        name = type(modifier).__name__
        if name in _FILLS_ZEROS:
            raise RacError(
                f"{name} after {type(ours).__name__} fills pruned weights again; leave it out and set "
                "quantization: {scheme: W4A16} (or its scheme) in the pruning entry, which keeps the zeros"
            )
        if quantizes and isinstance(modifier, QuantizationMixin):
            raise RacError(
                f"{name} after {type(ours).__name__} with quantization would quantize twice; leave one of them out"
            )


def is_autoround(modifier: Modifier) -> bool:
    """By its name, because importing AutoRoundModifier imports auto-round."""
    return type(modifier).__name__ == "AutoRoundModifier"


def check_autoround(modifiers: Iterable[Modifier]) -> None:
    """Refuse AutoRound with zero points, which llm-compressor 0.14 loses, before anything is sampled.

    Raises:
        RacError: saying what to use instead.
    """
    rounding: list[Any] = [modifier for modifier in modifiers if is_autoround(modifier)]
    schemes = [
        scheme
        for modifier in rounding
        for scheme in modifier.resolved_config.config_groups.values()
    ]
    if any(scheme.weights is not None and not scheme.weights.symmetric for scheme in schemes):
        raise RacError(
            "AutoRoundModifier with symmetric: false: llm-compressor 0.14 saves its weights without their zero points; set "
            "symmetric: true, or use GPTQModifier or ReasoningAwareSparseGPTModifier with solver: none"
        )
