"""Refuse what cannot run: `oneshot`'s arguments, a recipe's other modifiers, whole recipes.

llm-compressor passes the arguments of `oneshot` to no modifier. A modifier is initialized
inside a method of `Oneshot`, which holds them, so `find_oneshot` looks for that object
among the callers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import reprlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from compressed_tensors.registry import standardize_lookup_name
from compressed_tensors.utils import match_named_modules
from llmcompressor.entrypoints.oneshot import Oneshot
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.quantization import QuantizationMixin
from llmcompressor.recipe import Recipe
from loguru import logger
from pydantic import ValidationError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from rac_modifier.checkpoint.output_folder import check_output_folder
from rac_modifier.errors import RacError
from rac_modifier.llmcompressor.quantizer import Quantizer
from rac_modifier.llmcompressor.targets import find_targets
from rac_modifier.settings.entries import CalibrationEntry, PruningEntry
from rac_modifier.settings.recipe import overlooked
from rac_modifier.settings.recipe_files import parse_yaml

# Arguments about data that our calibration set replaces, by what to do instead.
_INSTEAD = {
    "name the data in the recipe (traces.problems, calibration.generic)": (
        "dataset dataset_path dataset_config_name dvc_data_repository splits text_column "
        "remove_columns preprocessing_func preprocessing_num_workers raw_kwargs streaming "
        "overwrite_cache"
    ),
    "sequences stay apart: each trace is calibrated on with its own prompt": "concatenate_data",
    "set calibration.tokens in the recipe, which counts tokens": "num_calibration_samples",
    "set calibration.max_sequence_tokens in the recipe": "max_seq_length",
    "sequences are always shuffled, by calibration.seed": "shuffle_calibration_samples",
    "set calibration.batch_tokens in the recipe, which is the size of a padded batch": (
        "batch_size data_collator pad_to_max_length"
    ),
    "the calibration set is in memory already": "dataloader_num_workers",
    "set calibration.prompt_weight in the recipe": "use_loss_mask",
    "a module that no calibration token reaches is an error here": "min_tokens_per_module",
}
REFUSED = {name: instead for instead, names in _INSTEAD.items() for name in names.split()}
# Arguments of upstream's sequential pipeline; only the pruning modifier refuses them.
REFUSED_BY_PRUNING = {
    "propagate_error": "a pruned layer's outputs are always what the next layer is calibrated on",
    "sequential_prefetch": "our loops load no batch ahead",
}
# By our loops, or by upstream around them (one is deprecated, and upstream warns).
HONOURED = {
    "moe_calibrate_all_experts",
    "pipeline",
    "quantization_aware_calibration",
    "sequential_offload_device",
    "sequential_targets",
    "sequential_targets_per_subgraph",
    "tracing_ignore",
}
_CALIBRATES = "ReasoningAwareCalibrationModifier"


def find_oneshot() -> Oneshot | None:
    """Return the `Oneshot` among the callers; None for a session without it."""
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Oneshot):
            return caller
        frame = frame.f_back
    return None


def check_arguments(oneshot: Oneshot, modifier: str, *, prunes: bool) -> None:
    """Refuse arguments without effect with our `modifier`, and a used output folder.

    An argument with its default value counts as not given.

    Raises:
        RacError: naming every such argument with its value and what to do instead.
    """
    pipeline = oneshot.dataset_args.pipeline
    if pipeline and standardize_lookup_name(pipeline) not in ("independent", "sequential"):
        raise RacError(
            f'pipeline="{pipeline}" does not prune layer by layer; use pipeline="independent" or '
            '"sequential"'
        )
    honoured = HONOURED if prunes else HONOURED | REFUSED_BY_PRUNING.keys()
    problems = [
        f"oneshot was given {name}={reprlib.repr(value)}, which has no effect with "
        f"{modifier}: leave the {name} argument out; "
        + (REFUSED | REFUSED_BY_PRUNING).get(name, "this version of rac-modifier does not know it")
        for name, value in _changed(oneshot.dataset_args).items()
        if name not in honoured
    ]
    if problems:
        raise RacError("\n".join(problems))
    arguments = oneshot.recipe_args
    _warn_of_overlooked(arguments.recipe if arguments else None)
    if oneshot.output_dir is not None:  # upstream saves a stage to a folder of its name
        stage = arguments.stage if arguments else None
        check_output_folder(Path(oneshot.output_dir, stage or ""), None, 0)


def _warn_of_overlooked(recipe: Any) -> None:
    """Warn of the stages of a recipe's text or file that upstream does not read."""
    if not isinstance(recipe, str | Path):
        return
    is_file = len(str(recipe)) < 4096 and "\n" not in str(recipe) and Path(recipe).is_file()
    text = Path(recipe).read_text(encoding="utf-8") if is_file else str(recipe)
    with contextlib.suppress(RacError):  # upstream reads other layouts too
        for part in overlooked(parse_yaml(text, "recipe")):
            logger.warning(
                f"llm-compressor does not read {part} of the recipe: a stage is named "
                "NAME_stage, and its groups NAME_modifiers"
            )


def given_tokenizer(oneshot: Oneshot, recipes: str | None, model: str) -> Any:
    """Return `oneshot`'s tokenizer; None if the recipe names one.

    `recipes` is the recipe's `tokenizer`, `model` the name or path of the model.

    Raises:
        RacError: both `oneshot` and the recipe name one.
    """
    tokenizer = getattr(oneshot.processor, "tokenizer", oneshot.processor)
    if recipes is None:
        return tokenizer
    name = getattr(tokenizer, "name_or_path", recipes)
    if name not in (recipes, model):  # upstream loads the model's if it was given none
        raise RacError(
            f"oneshot was given the tokenizer {name!r}, and the recipe names {recipes!r}; "
            "leave one of them out"
        )
    return None


def _changed(arguments: Any) -> dict[str, Any]:
    """Return the fields of a dataclass that do not have their default value."""
    changed = {}
    for field in dataclasses.fields(arguments):
        value, factory = getattr(arguments, field.name), field.default_factory
        default = field.default if factory is dataclasses.MISSING else factory()
        if value is not default and not (isinstance(value, type(default)) and value == default):
            changed[field.name] = value
    return changed


def check_first(modifiers: Sequence[Modifier]) -> None:
    """Refuse a recipe whose ReasoningAwareCalibrationModifier is not first (RacError)."""
    names = [type(modifier).__name__ for modifier in modifiers]
    if _CALIBRATES in names[1:]:
        before = ", ".join(names[: names.index(_CALIBRATES)])
        raise RacError(
            f"{_CALIBRATES} is behind {before}, which changes the model before its traces "
            "are taken; write it first"
        )


def check_later_modifiers(ours: Modifier, later: Iterable[Modifier], *, quantizes: bool) -> None:
    """Refuse modifiers of the recipe after `ours` that would undo its work (RacError).

    GPTQModifier moves pruned weights, too, to compensate for rounding (llm-compressor
    #2860).
    """
    for modifier in later:
        name = type(modifier).__name__
        if name == "GPTQModifier":
            raise RacError(
                f"{name} after {type(ours).__name__} fills pruned weights again; leave it "
                "out and set quantization: {scheme: W4A16} (or its scheme) in the pruning "
                "entry, which keeps the zeros"
            )
        if quantizes and isinstance(modifier, QuantizationMixin):
            raise RacError(
                f"{name} after {type(ours).__name__} with quantization would quantize "
                "twice; leave one of them out"
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
            weights = scheme.weights
            if weights is not None and not weights.symmetric:
                raise RacError(
                    "AutoRoundModifier with symmetric: false: llm-compressor 0.14 saves "
                    f"its weights without their zero points; set symmetric: true, {instead}"
                )
            alone = scheme.input_activations is None
            if weights is not None and (
                weights.strategy == "block" or (weights.strategy == "tensor_group" and alone)
            ):
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
    for place, modifier in enumerate(modifiers):
        if isinstance(modifier, PruningEntry):
            names = find_targets(model, modifier.targets, modifier.ignore, modifier.pattern)
            quantizes = modifier.quantization is not None
            check_later_modifiers(modifier, modifiers[place + 1 :], quantizes=quantizes)
            Quantizer(modifier.quantization, model, names, prunes=modifier.prunes)
        elif isinstance(modifier, QuantizationMixin):
            _check_groups(modifier, model)
    if not any(isinstance(modifier, CalibrationEntry) for modifier in modifiers):
        for modifier in modifiers:
            if modifier.requires_calibration_data:
                raise RacError(
                    f"{type(modifier).__name__} calibrates, and nothing says on what; add "
                    f"{_CALIBRATES}: {{}} before it"
                )


def _check_groups(modifier: Any, model: PreTrainedModel) -> None:
    """Refuse schemes that match nothing, or groups that do not divide the inputs."""
    name = type(modifier).__name__
    try:
        config = modifier.resolved_config
    except (ValueError, KeyError, TypeError, NotImplementedError) as error:
        raise RacError(f"{name}: {error}") from error
    matched = False
    for scheme in config.config_groups.values():
        group = getattr(scheme.weights, "group_size", None)
        for module_name, module in match_named_modules(model, scheme.targets, modifier.ignore):
            matched, columns = True, getattr(module, "in_features", 0)
            if group and group > 0 and columns % group:
                raise RacError(
                    f"{name}: {module_name} has {columns} inputs, no multiple of the "
                    f"group_size {group}; set one that divides them"
                )
    if not matched:
        raise RacError(f"{name}: its targets match no module of this {type(model).__name__}")
