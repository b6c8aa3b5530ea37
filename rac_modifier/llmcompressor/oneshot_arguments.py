"""The arguments of upstream's `oneshot` beside our recipe: each is honoured, or refused by name before anything is sampled.

llm-compressor passes its arguments to no modifier. But a modifier is initialized inside a method of `Oneshot`, which holds
them all, so they are read from there: `find_oneshot` looks for that object among the callers, and changes nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import reprlib
from pathlib import Path
from typing import Any

from compressed_tensors.registry import standardize_lookup_name
from llmcompressor.entrypoints.oneshot import Oneshot
from loguru import logger

from rac_modifier.checkpoint.output_folder import check_output_folder
from rac_modifier.errors import RacError
from rac_modifier.settings.recipe import overlooked
from rac_modifier.settings.recipe_files import parse_yaml

_DATA = "name the data in the recipe (traces.problems, calibration.generic)"
_BATCHES = "set calibration.batch_tokens in the recipe, which is the size of a padded batch"

# Arguments about data that our calibration set takes the place of, each with what to do instead.
REFUSED = {
    "dataset": _DATA,
    "dataset_path": _DATA,
    "dataset_config_name": _DATA,
    "dvc_data_repository": _DATA,
    "splits": _DATA,
    "text_column": _DATA,
    "remove_columns": _DATA,
    "preprocessing_func": _DATA,
    "preprocessing_num_workers": _DATA,
    "raw_kwargs": _DATA,
    "streaming": _DATA,
    "overwrite_cache": _DATA,
    "concatenate_data": "sequences stay apart: each trace is calibrated on with its own prompt",
    "num_calibration_samples": "set calibration.tokens in the recipe, which counts tokens",
    "max_seq_length": "set calibration.max_sequence_tokens in the recipe",
    "shuffle_calibration_samples": "sequences are always shuffled, by calibration.seed in the recipe",
    "batch_size": _BATCHES,
    "data_collator": _BATCHES,
    "pad_to_max_length": _BATCHES,
    "dataloader_num_workers": "the calibration set is in memory already",
    "use_loss_mask": "set calibration.prompt_weight in the recipe, which weighs tokens",
    "min_tokens_per_module": "a module that no calibration token reaches is an error here",
}
# Arguments of upstream's sequential pipeline that our loops have no counterpart of; only the pruning modifier refuses them.
REFUSED_BY_PRUNING = {
    "propagate_error": "a pruned layer's outputs are always what the next layer is calibrated on",
    "sequential_prefetch": "our loops load no batch ahead",
}
# Honoured: by our loops, by upstream around them, or (the deprecated one) without effect in upstream itself, which warns.
HONOURED = {
    "moe_calibrate_all_experts",
    "pipeline",
    "quantization_aware_calibration",
    "sequential_offload_device",
    "sequential_targets",
    "sequential_targets_per_subgraph",
    "tracing_ignore",
}
_PIPELINES = ("independent", "sequential")


def find_oneshot() -> Oneshot | None:
    """The `Oneshot` that initializes a modifier now, from its callers; None where the session is used without it."""
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Oneshot):
            return caller
        frame = frame.f_back
    return None


def check_arguments(oneshot: Oneshot, modifier: str, *, prunes: bool) -> None:
    """Refuse what would have no effect beside a recipe of ours, and an output folder that is in use.

    `modifier` is the name of ours, for the message. An argument that has its default value counts as not given.

    Raises:
        RacError: naming every such argument with its value and what to do instead.
    """
    pipeline = oneshot.dataset_args.pipeline
    if pipeline and standardize_lookup_name(pipeline) not in _PIPELINES:
        raise RacError(
            f'pipeline="{pipeline}" does not prune layer by layer; use pipeline="independent" or "sequential"'
        )
    refused = REFUSED | REFUSED_BY_PRUNING if prunes else REFUSED
    known = HONOURED | REFUSED.keys() | REFUSED_BY_PRUNING.keys()
    problems = []
    for name, value in _given(oneshot.dataset_args).items():
        if name in refused or name not in known:
            instead = refused.get(name, "this version of rac-modifier does not know it")
            problems.append(
                f"oneshot was given {name}={reprlib.repr(value)}, which has no effect beside {modifier}: leave the {name} "
                f"argument out; {instead}"
            )
    if problems:
        raise RacError("\n".join(problems))
    warn_of_overlooked(oneshot.recipe_args.recipe if oneshot.recipe_args else None)
    if oneshot.output_dir is not None:
        stage = (
            oneshot.recipe_args.stage if oneshot.recipe_args else None
        )  # upstream saves to a folder of this name in it
        check_output_folder(Path(oneshot.output_dir, stage or ""), None, 0)


def warn_of_overlooked(recipe: Any) -> None:
    """Warn of the stages of a recipe's text or file that upstream does not read for their names."""
    if not isinstance(recipe, (str, Path)):
        return
    is_file = len(str(recipe)) < 4096 and "\n" not in str(recipe) and Path(recipe).is_file()
    text = Path(recipe).read_text(encoding="utf-8") if is_file else str(recipe)
    with contextlib.suppress(RacError):  # upstream reads other layouts too
        for part in overlooked(parse_yaml(text, "recipe")):
            logger.warning(
                f"llm-compressor does not read {part} of the recipe: a stage is named NAME_stage, "
                "and its groups NAME_modifiers"
            )


def given_tokenizer(oneshot: Oneshot, recipes: str | None, model: str) -> Any:
    """The tokenizer that `oneshot` was given or has loaded beside the model; None where the recipe names its own.

    `recipes` is the recipe's `tokenizer`, `model` the name or path of the model.

    Raises:
        RacError: both `oneshot` and the recipe name one.
    """
    processor = oneshot.processor
    tokenizer = getattr(processor, "tokenizer", processor)
    if recipes is None:
        return tokenizer
    name = getattr(
        tokenizer, "name_or_path", recipes
    )  # upstream loads the model's own where it was given none
    if name not in (recipes, model):
        raise RacError(
            f"oneshot was given the tokenizer {name!r}, and the recipe names {recipes!r}; leave one of them out"
        )
    return None


def _given(arguments: Any) -> dict[str, Any]:
    """The fields of a dataclass that do not have their default value."""
    given = {}
    for field in dataclasses.fields(arguments):
        value = getattr(arguments, field.name)
        default = (
            field.default
            if field.default_factory is dataclasses.MISSING
            else field.default_factory()
        )
        if value is not default and not (isinstance(value, type(default)) and value == default):
            given[field.name] = value
    return given
