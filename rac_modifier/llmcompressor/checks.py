"""Refuse what cannot run: `oneshot`'s arguments, a recipe's other modifiers, whole recipes."""

import reprlib
from collections.abc import Container, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.registry import standardize_lookup_name
from compressed_tensors.utils import match_named_modules
from llmcompressor.args import DatasetArguments
from llmcompressor.entrypoints.oneshot import Oneshot
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.quantization import QuantizationMixin
from llmcompressor.modifiers.transform import AWQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from llmcompressor.recipe import Recipe
from loguru import logger
from pydantic import ValidationError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from rac_modifier.checkpoint.output_folder import check_output_folder
from rac_modifier.errors import RacError
from rac_modifier.formats.module_names import targets_vocabulary
from rac_modifier.formats.stored_weight import PER_BLOCK
from rac_modifier.llmcompressor.quantizer import Quantizer
from rac_modifier.llmcompressor.targets import find_targets
from rac_modifier.settings.entries import CalibrationEntry, PruningEntry
from rac_modifier.settings.recipe import CheckedRecipe

# Arguments of `oneshot` that our loops read, or upstream around them.
HONOURED = {
    "moe_calibrate_all_experts",
    "pipeline",
    "quantization_aware_calibration",
    "sequential_offload_device",
    "sequential_targets",
    "sequential_targets_per_subgraph",
    "tracing_ignore",
}
# These configure upstream's sequential pipeline, which other modifiers run in.
_OF_UPSTREAMS_LOOP = {"propagate_error", "sequential_prefetch"}
_CALIBRATES = "ReasoningAwareCalibrationModifier"
# What modifiers do to weights that were pruned or rounded before.
_UNDOES = {"REAPPruningModifier": "removes its work", "SpinQuantModifier": "rotates its weights"}
_OF_ACTIVATIONS = ("R3", "R4", "u", "v")  # rotations


def check_arguments(oneshot: Oneshot, modifier: str, *, prunes: bool) -> None:
    """Refuse arguments without effect with our `modifier`, and a used output folder (RacError)."""
    pipeline = oneshot.dataset_args.pipeline
    if pipeline and standardize_lookup_name(pipeline) not in ("independent", "sequential"):
        raise RacError(
            f'pipeline="{pipeline}" does not prune by layer; use "independent" or "sequential"'
        )
    honoured = HONOURED if prunes else HONOURED | _OF_UPSTREAMS_LOOP
    given, defaults = vars(oneshot.dataset_args), vars(DatasetArguments())
    problems = [
        f"oneshot was given {name}={reprlib.repr(given[name])}, which has no effect with "
        f"{modifier}: leave the {name} argument out; data and batches are settings of the recipe "
        "(traces, calibration)"
        for name, default in defaults.items()
        if name not in honoured and not (given[name] is default or given[name] == default)
    ]
    if problems:
        raise RacError("\n".join(problems))
    arguments = oneshot.recipe_args
    if arguments and isinstance(arguments.recipe, str | Path):
        try:
            CheckedRecipe.read(arguments.recipe)
        except RacError as error:  # upstream reads other layouts too, and may have more modifiers
            logger.warning(str(error))
    if oneshot.output_dir is not None:  # upstream saves a stage to a folder of its name
        stage = arguments.stage if arguments else None
        check_output_folder(Path(oneshot.output_dir, stage or ""))


def given_tokenizer(oneshot: Oneshot, recipes: str | None, model: str) -> Any:
    """Return `oneshot`'s tokenizer; None if the recipe names one, `recipes` (RacError: both do)."""
    tokenizer = getattr(oneshot.processor, "tokenizer", oneshot.processor)
    if recipes is None:
        return tokenizer
    name = getattr(tokenizer, "name_or_path", recipes)
    if name not in (recipes, model):  # upstream loads the model's if it was given none
        raise RacError(f"oneshot has tokenizer {name!r}, and the recipe {recipes!r}; leave one out")
    return None


def check_first(modifiers: Sequence[Modifier]) -> None:
    """Refuse a recipe whose ReasoningAwareCalibrationModifier is not first (RacError)."""
    names = [type(modifier).__name__ for modifier in modifiers]
    if _CALIBRATES in names[1:]:
        before = ", ".join(names[: names.index(_CALIBRATES)])
        raise RacError(f"{_CALIBRATES} is behind {before}, which changes the model; write it first")


def check_other_modifiers(ours: PruningEntry, modifiers: Sequence[Modifier]) -> None:
    """Refuse modifiers of the recipe that would undo the work of `ours`, or spoil it (RacError)."""
    kind, quantizes, behind = type(ours).__name__, ours.quantization is not None, False
    for modifier in modifiers:
        name, behind = type(modifier).__name__, behind or modifier is ours
        if turned := [r for r in _OF_ACTIVATIONS if r in getattr(modifier, "rotations", ())]:
            raise RacError(
                f"{name} with rotations: {', '.join(turned)} rotates activations, and {kind} "
                "calibrates on those before it; leave it out, or use R1 and R2 of SpinQuantModifier"
            )
        if name == "SpinQuantModifier" and ours.recover is not None:
            raise RacError(
                f"recover next to {name}, which rotates the head: it trains towards the dense "
                "model's hidden states; leave one out"
            )
        if behind and name in _UNDOES:
            raise RacError(f"{name} after {kind} {_UNDOES[name]}; write it first")
        if behind and name == "GPTQModifier":  # llm-compressor #2860
            raise RacError(
                f"{name} after {kind} fills pruned weights again; leave it out and "
                "set quantization: {scheme: W4A16} (or its scheme) in the pruning entry"
            )
        if behind and quantizes and isinstance(modifier, AWQModifier | SmoothQuantModifier):
            raise RacError(
                f"{name} after {kind} scales weights that are rounded; leave it out, or quantize "
                "behind it with QuantizationModifier, not in the pruning entry"
            )
        if behind and (quantizes or ours.recover) and isinstance(modifier, QuantizationMixin):
            groups = modifier.resolved_config.config_groups.values()
            if not all(targets_vocabulary(name) for group in groups for name in group.targets):
                why = "quantizes twice; leave one out"
                if not quantizes:
                    why = "takes its scales before recover trains the weights; leave it out and "
                    why += "set quantization: {scheme: ...} in the pruning entry"
                raise RacError(f"{name} after {kind} {why}, or set targets: [lm_head] for the head")


def check_packing(
    ours: PruningEntry,
    modifiers: Sequence[Modifier],
    model: PreTrainedModel,
    pruned: Container[torch.nn.Module],
) -> None:
    """Refuse schemes of pruned modules that packing would refuse when all is done (RacError)."""
    if not ours.prunes or ours.storage != "packed":
        return
    for modifier in modifiers:
        if not isinstance(modifier, QuantizationMixin):
            continue
        for group in modifier.resolved_config.config_groups.values():
            weights = group.weights
            if weights is None or (weights.symmetric and weights.strategy != "block"):
                continue
            why, instead = "zeros become zero points", "quantize with a symmetric scheme"
            if weights.symmetric:
                why, instead = PER_BLOCK, "quantize with a scale per row (FP8_DYNAMIC)"
            for name, module in match_named_modules(model, group.targets, modifier.ignore):
                if module in pruned:
                    raise RacError(
                        f"{type(modifier).__name__}: {name} is pruned and cannot be packed, since "
                        f"{why}; {instead}, or set storage: dense"
                    )


def is_autoround(modifier: Modifier) -> bool:
    """Return whether a modifier is AutoRoundModifier, without importing auto-round."""
    return type(modifier).__name__ == "AutoRoundModifier"


def check_autoround(modifiers: Iterable[Modifier]) -> None:
    """Refuse schemes of AutoRound that llm-compressor 0.14 loses or fails at (RacError)."""
    instead = "or use GPTQModifier or ReasoningAwareSparseGPTModifier with solver: none"
    rounding: list[Any] = [modifier for modifier in modifiers if is_autoround(modifier)]
    for modifier in rounding:
        for scheme in modifier.resolved_config.config_groups.values():
            weights, alone = scheme.weights, scheme.input_activations is None
            if weights is None:
                continue
            if not weights.symmetric:
                raise RacError(
                    "AutoRoundModifier with symmetric: false: llm-compressor 0.14 saves "
                    f"its weights without their zero points; set symmetric: true, {instead}"
                )
            if weights.strategy == "block" or (weights.strategy == "tensor_group" and alone):
                raise RacError(
                    f"AutoRoundModifier with strategy: {weights.strategy}: it has no rounding "
                    f"for these weights; set another, such as FP8_DYNAMIC or NVFP4, {instead}"
                )


def skeleton_of(source: str) -> PreTrainedModel:
    """Return the model of a folder or id, with shapes and without weights."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(source, trust_remote_code=False)
        )
    return model


def check_recipe(recipe: dict[str, Any], model: PreTrainedModel) -> None:
    """Refuse a recipe that could not run on this model or skeleton (RacError)."""
    try:
        modifiers = Recipe.create_instance(yaml.safe_dump(recipe, sort_keys=False)).modifiers
        quantizing: list[Any] = [m for m in modifiers if isinstance(m, QuantizationMixin)]
        schemes = [list(m.resolved_config.config_groups.values()) for m in quantizing]
    except (ValueError, KeyError, TypeError, NotImplementedError) as error:
        problems = str(error)
        if isinstance(error, ValidationError):
            errors = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
            problems = "; ".join(errors)
        raise RacError(f"llm-compressor refuses its modifiers ({problems})") from error
    if not modifiers:
        raise RacError("its recipe has no modifier; name one, such as QuantizationModifier")
    check_first(modifiers)
    check_autoround(modifiers)
    for modifier in modifiers:
        if isinstance(modifier, PruningEntry):
            names = find_targets(model, modifier.targets, modifier.ignore, modifier.pattern)
            check_other_modifiers(modifier, modifiers)
            check_packing(modifier, modifiers, model, names)
            Quantizer(modifier.quantization, model, names, prunes=modifier.prunes)
    for modifier, of_modifier in zip(quantizing, schemes, strict=True):
        _check_groups(modifier, of_modifier, model)
    if not any(isinstance(modifier, CalibrationEntry) for modifier in modifiers):
        for modifier in modifiers:
            if modifier.requires_calibration_data:
                raise RacError(
                    f"{type(modifier).__name__} calibrates, and nothing says on what; add "
                    f"{_CALIBRATES}: {{}} before it"
                )


def _check_groups(
    modifier: Any, schemes: Sequence[QuantizationScheme], model: PreTrainedModel
) -> None:
    """Refuse schemes that match nothing, or groups that do not divide the inputs."""
    name, matched = type(modifier).__name__, False
    for scheme in schemes:
        group = getattr(scheme.weights, "group_size", None) or 0
        for module_name, module in match_named_modules(model, scheme.targets, modifier.ignore):
            matched, columns = True, getattr(module, "in_features", 0)
            if group > 0 and columns % group:
                raise RacError(
                    f"{name}: {module_name} has {columns} inputs, no multiple of the "
                    f"group_size {group}; set one that divides them"
                )
    if not matched:
        raise RacError(f"{name}: its targets match no module of this {type(model).__name__}")
