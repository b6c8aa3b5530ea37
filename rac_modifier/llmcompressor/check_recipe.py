"""A whole recipe checked against a model's shapes, without its weights."""

from __future__ import annotations

from typing import Any

import torch
import yaml
from compressed_tensors.utils import match_named_modules
from llmcompressor.modifiers.quantization import QuantizationMixin
from llmcompressor.recipe import Recipe
from pydantic import ValidationError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from rac_modifier.errors import RacError
from rac_modifier.llmcompressor.calibration_modifier import CalibratingModifier, check_stands_first
from rac_modifier.llmcompressor.pruning_modifier import ReasoningAwareSparseGPTModifier
from rac_modifier.llmcompressor.quantizer import GroupQuantizer
from rac_modifier.llmcompressor.targets import check_autoround, check_later_modifiers, find_targets


def skeleton_of(source: str) -> PreTrainedModel:
    """The model of a folder or id with shapes and without weights."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(source, trust_remote_code=False)
        )
    return model


def check_recipe(recipe: dict[str, Any], model: PreTrainedModel) -> None:
    """Refuse what could not be run on this model: upstream's modifiers, targets, patterns and groups that fit no shape.

    Args:
        recipe: as a file has it, with our entry checked.
        model: may be a skeleton.

    Raises:
        RacError: naming what does not fit.
    """
    try:
        modifiers = Recipe.create_instance(yaml.safe_dump(recipe, sort_keys=False)).modifiers
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise RacError(f"llm-compressor refuses its modifiers ({problems})") from error
    except (ValueError, KeyError, TypeError, NotImplementedError) as error:
        raise RacError(f"llm-compressor refuses its modifiers ({error})") from error
    check_stands_first(modifiers)
    for place, modifier in enumerate(modifiers):
        if isinstance(modifier, ReasoningAwareSparseGPTModifier):
            names = find_targets(model, modifier.targets, modifier.ignore, modifier.pattern)
            check_later_modifiers(
                modifier, modifiers[place + 1 :], quantizes=modifier.quantization is not None
            )
            if modifier.quantization is not None:
                GroupQuantizer(modifier.quantization, model, names, prunes=modifier.prunes)
        elif isinstance(modifier, QuantizationMixin):
            _check_groups(modifier, model)
    check_autoround(modifiers)
    if not any(isinstance(modifier, CalibratingModifier) for modifier in modifiers):
        _check_needs_no_data(modifiers)


def _check_needs_no_data(modifiers: list[Any]) -> None:
    """Refuse a recipe without a modifier of ours that calibrates, or that does nothing at all."""
    names = [
        type(modifier).__name__ for modifier in modifiers if modifier.requires_calibration_data
    ]
    if names:
        raise RacError(
            f"{names[0]} calibrates, and nothing says on what; add ReasoningAwareCalibrationModifier: {{}} before it"
        )
    if not modifiers:
        raise RacError("its recipe has no modifier; name one, such as QuantizationModifier")


def _check_groups(modifier: Any, model: PreTrainedModel) -> None:
    """Refuse schemes of upstream's modifiers that match nothing, or whose groups do not divide a module's inputs."""
    name = type(modifier).__name__
    try:
        config = modifier.resolved_config
    except (ValueError, KeyError, TypeError, NotImplementedError) as error:
        raise RacError(f"{name}: {error}") from error
    matched = False
    for scheme in config.config_groups.values():
        for module_name, module in match_named_modules(model, scheme.targets, modifier.ignore):
            matched = True
            group, columns = (
                getattr(scheme.weights, "group_size", None),
                getattr(module, "in_features", 0),
            )
            if group and group > 0 and columns % group:
                raise RacError(
                    f"{name}: {module_name} has {columns} inputs, no multiple of the group_size {group}; set one that "
                    "divides them"
                )
    if not matched:
        raise RacError(f"{name}: its targets match no module of this {type(model).__name__}")
