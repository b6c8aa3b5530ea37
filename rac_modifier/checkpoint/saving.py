"""Make a model's `save_pretrained` write a checked, packed sparse checkpoint with its record and its card."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from loguru import logger
from transformers import AutoTokenizer, PreTrainedModel

from rac_modifier.checkpoint import upload as hub
from rac_modifier.checkpoint.bitmask import nonzero
from rac_modifier.checkpoint.card import model_card
from rac_modifier.checkpoint.license import CARD_NAME, license_of
from rac_modifier.checkpoint.measured import write_int8_activations
from rac_modifier.checkpoint.names_on_disk import keep_expert_names, names_on_disk
from rac_modifier.checkpoint.new_files import STAGING, move_into_place
from rac_modifier.checkpoint.packing import mark_dense, pack_checkpoint
from rac_modifier.checkpoint.quantization_config import quantized_weight, weight_schemes
from rac_modifier.checkpoint.record import RUN_RECORD_NAME, environment
from rac_modifier.checkpoint.sparsity_config import CONFIG_FILE, QUANTIZATION_KEY, SparsityRecord
from rac_modifier.errors import RacError
from rac_modifier.files import read_json, write_json_atomic, write_text_atomic
from rac_modifier.machine_paths import text_without_paths, without_paths
from rac_modifier.processes import Processes
from rac_modifier.pruning.masks import holds
from rac_modifier.settings.pattern import Pattern

RECIPE_NAME = "recipe.yaml"  # llm-compressor's
# Packing holds the new tensors of one file in memory. transformers' own limit is 50GB.
_LARGEST_FILE = "5GB"


def _nothing(model: PreTrainedModel, save_compressed: bool) -> None: ...


@dataclass(frozen=True)
class SavePlan:
    """What a compressed model must look like on disk; without `modules` nothing is pruned, checked or packed.

    `patterns` has one pattern per module of `modules`; the activations of `int8_activations`, some of these, may have 8 bits.
    `record` is the run's part of the record beside the weights; versions and the base model are added when it is written.
    `tokenizer` is a path or id, None for that of the base model.
    `prepare(model, save_compressed)` is called before saving, those of `after` when everything is written. Of several `processes`
    all save, and the first one writes.
    """

    record: dict[str, Any]
    patterns: Mapping[str, Pattern] = field(default_factory=dict)
    modules: Mapping[str, torch.nn.Linear] = field(default_factory=dict)
    int8_activations: Sequence[str] = ()
    storage: Literal["packed", "dense"] = "packed"
    tokenizer: str | None = None
    prepare: Callable[[PreTrainedModel, bool], None] = _nothing
    after: Sequence[Callable[[], None]] = ()
    processes: Processes = field(default_factory=Processes)


def save_with_record(model: PreTrainedModel, plan: Callable[[], SavePlan]) -> None:
    """Replace `model.save_pretrained` by one that checks the pattern, saves as before, and packs the result.

    `plan` is called when the model is saved, after all modifiers of a recipe. The present `save_pretrained` is wrapped, so
    that of upstream for quantized models is still used. A second call only replaces the plan.

    No file that is written holds an absolute path: models, records and cards are passed on.
    """
    inner = getattr(model.save_pretrained, "_rac_inner", model.save_pretrained)

    @functools.wraps(inner)
    def save_pretrained(
        save_directory: str | Path,
        *args: Any,
        save_compressed: bool = True,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        # upstream would upload the weights before they are packed
        options = (
            {key: kwargs.pop(key) for key in hub.OPTIONS if key in kwargs} if push_to_hub else {}
        )
        current = plan()
        check_pattern(current)
        folder = _free_folder(Path(save_directory))
        staging = folder / STAGING  # the folder is no model before all of it is written
        if current.processes.is_first:
            shutil.rmtree(staging, ignore_errors=True)
        dense_linears = [
            name
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and name not in current.modules
        ]
        current.prepare(model, save_compressed)
        kwargs.setdefault("max_shard_size", _LARGEST_FILE)
        keep_expert_names(model)
        inner(str(staging), *args, save_compressed=save_compressed, **kwargs)
        if current.processes.is_first:
            packed = bool(current.modules) and current.storage == "packed" and save_compressed
            _write_rest(model, staging, current, dense_linears, packed)
            if folder != Path(
                save_directory
            ):  # oneshot saves its tokenizer to the folder that it was given
                source = current.tokenizer or model.config._name_or_path
                AutoTokenizer.from_pretrained(source, trust_remote_code=False).save_pretrained(
                    staging
                )
            move_into_place(staging, folder)
            what = (
                f"{len(current.modules)} pruned modules ({current.storage})"
                if current.modules
                else "the model"
            )
            logger.info(f"saved {what} to {folder}")
            for step in current.after:
                step()
            if push_to_hub:
                hub.upload(folder, **{"repo_id": Path(save_directory).name, **options})
        current.processes.wait()

    save_pretrained._rac_inner = inner  # type: ignore[attr-defined]
    # llm-compressor reads this before it wraps save_pretrained once more
    save_pretrained._overridden = getattr(inner, "_overridden", False)  # type: ignore[attr-defined]
    model.save_pretrained = save_pretrained  # type: ignore[method-assign, assignment]
    model.push_to_hub = functools.partial(hub.push_to_hub, model)  # type: ignore[assignment]


def _write_rest(
    model: PreTrainedModel, folder: Path, plan: SavePlan, dense_linears: Sequence[str], packed: bool
) -> None:
    """Pack the weights that upstream has written, and write the record and the card beside them."""
    if plan.modules:
        saved = names_on_disk(model, [*plan.modules, *dense_linears])
        modules = {saved[name]: plan.patterns[name].mask_structure for name in plan.modules}
        if packed:
            pack_checkpoint(folder, modules, dense_linears=[saved[name] for name in dense_linears])
            if plan.int8_activations:
                write_int8_activations(folder, [saved[name] for name in plan.int8_activations])
        else:
            mark_dense(folder, modules)
            if plan.int8_activations:
                logger.warning(
                    f"{len(plan.int8_activations)} modules lose nothing with activations in 8 bits, which only a packed "
                    "checkpoint can record; save it with save_compressed=True"
                )
    elif SparsityRecord.of(read_json(folder / CONFIG_FILE)).int8_activations:
        write_int8_activations(folder, [])  # measured with the weights that the model had before
    source = model.config._name_or_path
    record = {"base_model": source, **plan.record, "versions": environment()}
    if schemes := weight_schemes(read_json(folder / CONFIG_FILE).get(QUANTIZATION_KEY)):
        record["quantization"] = [scheme.describe() for scheme in schemes]
    record = without_paths(record)
    write_json_atomic(folder / RUN_RECORD_NAME, record)
    write_text_atomic(folder / CARD_NAME, model_card(record, license_of(source), packed))
    _clean_recipe(folder)


def _clean_recipe(folder: Path) -> None:
    """Take absolute paths out of the copy of the recipe that upstream writes beside the weights."""
    path = folder / RECIPE_NAME
    if path.is_file():
        text = path.read_text(encoding="utf-8")
        # tokens, not objects: upstream writes enums with Python tags
        scalars = [token.value for token in yaml.scan(text) if isinstance(token, yaml.ScalarToken)]
        write_text_atomic(path, text_without_paths(text, scalars))


def check_pattern(plan: SavePlan) -> None:
    """Check every pruned module against its pattern, also one that is quantized or was saved before.

    Raises:
        RacError: naming the first module whose zeros are gone, as after a GPTQModifier, which does not keep them.
    """
    broken = [
        name
        for name, module in plan.modules.items()
        if not _holds(name, module, plan.patterns[name])
    ]
    if broken:
        raise RacError(
            f"{broken[0]} ({len(broken)} modules in all) no longer holds its pattern: "
            f"{plan.patterns[broken[0]].describe()}. "
            "A modifier after pruning filled the zeros, as llm-compressor's GPTQModifier does. QuantizationModifier keeps them, "
            "and so does quantization: {scheme: ...} in ReasoningAwareSparseGPTModifier, which compensates errors as GPTQ does. "
            "Nothing was written"
        )


def _holds(name: str, module: torch.nn.Linear, pattern: Pattern) -> bool:
    if hasattr(module, "weight_packed"):  # by an earlier save
        weight = quantized_weight(
            {part: getattr(module, part) for part in ("weight_packed", "weight_shape")}, name
        )[0]
    else:
        weight = module.weight.detach()
    return holds(nonzero(weight), pattern)


def _free_folder(folder: Path) -> Path:
    """The folder, or, if it holds weights already, a new one beside it: hours of work are neither lost nor overwritten."""
    if not any(folder.glob("*.safetensors")):
        return folder
    for number in range(1, 1000):
        other = folder.with_name(f"{folder.name}-{number}")
        if not any(other.glob("*.safetensors")):
            logger.warning(
                f"{folder} holds a checkpoint already and is left as it is: saving to {other}"
            )
            return other
    raise RacError(f"{folder} and 999 folders beside it hold checkpoints; name another output_dir")
