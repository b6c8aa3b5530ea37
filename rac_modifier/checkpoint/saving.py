"""Make `save_pretrained` write a checked, packed sparse checkpoint with record and card."""

import functools
import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from compressed_tensors.utils import patch_attr
from loguru import logger
from transformers import GenerationConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    rename_source_key,
)

from rac_modifier.checkpoint import card
from rac_modifier.checkpoint.output_folder import STAGING, move_into_place
from rac_modifier.checkpoint.packing import mark_dense, pack_checkpoint
from rac_modifier.distributed.processes import Processes
from rac_modifier.errors import RacError
from rac_modifier.formats.bitmask import nonzero
from rac_modifier.formats.quantization_config import (
    CONFIG_FILE,
    QUANTIZATION_KEY,
    packed_format,
    weight_schemes,
    with_dense_mark,
)
from rac_modifier.formats.words import WORDS, PackQuantized
from rac_modifier.pruning.masks import holds
from rac_modifier.runtime import files
from rac_modifier.runtime.progress import Phase
from rac_modifier.settings.pattern import Pattern

_RECIPE_NAME = "recipe.yaml"  # llm-compressor's
# Packing holds the new tensors of one file in memory. transformers' own limit is 50GB.
_LARGEST_FILE = "5GB"
_MERGED = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "up_proj": ("up_proj",),
    "down_proj": ("down_proj",),
}
_EXPERT = re.compile(r"\.experts\.\d+\.(gate_proj|up_proj|down_proj)$")
_EXPERT_SOURCE = re.compile(r"\.experts\.\*\.(\w+)\.weight$")


@dataclass(frozen=True)
class SavePlan:
    """What a compressed model must look like on disk; without `modules` nothing is packed."""

    record: dict[str, Any]  # versions and the base model are added when it is written
    patterns: Mapping[str, Pattern] = field(default_factory=dict)  # of `modules`
    modules: Mapping[str, torch.nn.Linear] = field(default_factory=dict)
    storage: Literal["packed", "dense"] = "packed"
    # called with the model and `save_compressed` before saving
    prepare: Callable[[PreTrainedModel, bool], None] = lambda *_: None
    after: Sequence[Callable[[], None]] = ()  # called when everything is written
    activations: Mapping[str, Any] | None = None  # bits by layer, as the run record has them
    processes: Processes = field(default_factory=Processes)  # all save, the first one writes


def save_with_record(model: PreTrainedModel, plan: Callable[[], SavePlan]) -> None:
    """Replace `model.save_pretrained` by one that also checks the pattern and packs.

    `plan` is called when the model is saved. No file that is written holds an absolute path.
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
        with Phase(f"saving to {save_directory}"):
            write(plan(), Path(save_directory), *args, save_compressed=save_compressed, **kwargs)
        if push_to_hub:  # upstream would upload the weights before they are packed
            step = f"hf upload OWNER/NAME {save_directory}"
            raise RacError(f"{save_directory}: saved, and not uploaded; {step}")

    def write(
        current: SavePlan, folder: Path, *args: Any, save_compressed: bool, **kwargs: Any
    ) -> None:
        _check_patterns(current)
        staging = folder / STAGING  # the folder is no model before all of it is written
        if current.processes.is_first:
            if any(folder.glob("*.safetensors")):
                raise RacError(
                    f"{folder}: holds a checkpoint, which is left as it is; name another folder"
                )
            shutil.rmtree(staging, ignore_errors=True)
        linears = (name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear))
        dense = [name for name in linears if name not in current.modules]
        current.prepare(model, save_compressed)
        kwargs.setdefault("max_shard_size", _LARGEST_FILE)
        keep_expert_names(model)
        with _generation_config_as_loaded():
            inner(str(staging), *args, save_compressed=save_compressed, **kwargs)
        if current.processes.is_first:
            _forget_packing(staging)
            packed = bool(current.modules) and current.storage == "packed" and save_compressed
            saved = names_on_disk(model, [*current.modules, *dense])
            structures = {saved[n]: current.patterns[n].mask_structure for n in current.modules}
            if packed:
                pack_checkpoint(staging, structures, [saved[name] for name in dense])
            else:  # by this record the vLLM plugin also knows a checkpoint that is only quantized
                mark_dense(staging, structures)
            _write_record(model, staging, current, packed)
            if current.activations and save_compressed:
                bits = {name: row["bits"] for name, row in current.activations["layers"].items()}
                eight = [saved[name] for name in bits if bits[name] == 8]
                card.record_activations(staging, eight, current.activations)
            move_into_place(staging, folder)
            logger.info(f"saved the model to {folder}")
            for step in current.after:
                step()
        current.processes.wait()

    save_pretrained._rac_inner = inner  # type: ignore[attr-defined]
    # llm-compressor reads this before it wraps save_pretrained once more
    save_pretrained._overridden = getattr(inner, "_overridden", False)  # type: ignore[attr-defined]
    model.save_pretrained = save_pretrained  # type: ignore[method-assign, assignment]


def _generation_config_as_loaded() -> AbstractContextManager[None]:
    """Save a generation config that transformers loads, and refuses to save.

    Contract: test_seam_a_generation_config_is_checked_when_it_is_saved
    Until: `save_pretrained` of a model takes the config as it is.
    """
    return patch_attr(GenerationConfig, "validate", lambda *_, **__: None)


def _forget_packing(folder: Path) -> None:
    """Leave out that the source is packed: llm-compressor copies that from its config.json."""
    config = files.read_json(folder / CONFIG_FILE)
    if packed_format(config):  # what was just saved is dense
        files.write_json_atomic(folder / CONFIG_FILE, with_dense_mark(config, {}))


def _write_record(model: PreTrainedModel, folder: Path, plan: SavePlan, packed: bool) -> None:
    """Write record, card and recipe without absolute paths; an error of theirs is only logged."""
    source = model.config._name_or_path
    try:
        record = {"base_model": source, **plan.record, "versions": card.environment()}
        if schemes := weight_schemes(files.read_json(folder / CONFIG_FILE).get(QUANTIZATION_KEY)):
            record["quantization"] = [scheme.describe() for scheme in schemes]
        _clean_recipe(folder / _RECIPE_NAME)
        # JSON has no NaN and no objects of Python: their names
        plain = json.loads(json.dumps(record, default=str), parse_constant=str)
        record = files.without_paths(plain)
        files.write_json_atomic(folder / card.RUN_RECORD_NAME, record)
        files.write_text_atomic(
            folder / card.CARD_NAME, card.model_card(record, card.license_of(source), packed)
        )
    except Exception as error:
        logger.opt(exception=error).error(
            f"the record of the run and the card are incomplete ({error}); the weights are saved"
        )


def _clean_recipe(path: Path) -> None:
    """Remove absolute paths from the copy of the recipe that upstream writes."""
    if path.is_file():
        text = path.read_text(encoding="utf-8")
        # tokens, not objects: upstream writes enums with Python tags
        scalars = [token.value for token in yaml.scan(text) if isinstance(token, yaml.ScalarToken)]
        files.write_text_atomic(path, files.text_without_paths(text, scalars))


def _check_patterns(plan: SavePlan) -> None:
    """Check every pruned module against its pattern, also if it is quantized (RacError)."""
    modules = plan.modules.items()
    broken = [name for name, module in modules if not _holds(name, module, plan.patterns[name])]
    if broken:
        raise RacError(
            f"{broken[0]} ({len(broken)} modules in all) no longer holds its pattern: "
            f"{plan.patterns[broken[0]].describe()}. A modifier after pruning filled the zeros, as "
            "llm-compressor's GPTQModifier does. QuantizationModifier keeps them, and so does "
            "quantization: {scheme: ...} in ReasoningAwareSparseGPTModifier. Nothing was written"
        )


def _holds(name: str, module: torch.nn.Linear, pattern: Pattern) -> bool:
    if not hasattr(module, WORDS):
        return holds(nonzero(module.weight.detach()), pattern)
    parts = (part for part in PackQuantized.dtypes if hasattr(module, part))  # of an earlier save
    stored = PackQuantized.read({part: getattr(module, part) for part in parts}, name)
    return stored is None or holds(nonzero(stored.dense()), pattern)


def keep_expert_names(model: torch.nn.Module) -> None:
    """Save separate experts under merged experts' names, which transformers' conversions know."""
    modules = model.named_modules()
    if any(isinstance(m, torch.nn.Linear) and _EXPERT.search(name) for name, m in modules):
        conversions: list[WeightTransform] = []
        for conversion in _conversions(model):
            conversions += _renamings(conversion) or [conversion]
        model._weight_conversions = conversions  # type: ignore[assignment] # what is saved by


def names_on_disk(model: torch.nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Return the names of modules in the files of a saved model, by their names in the model."""
    back = [conversion.reverse_transform() for conversion in reversed(_conversions(model))]
    renamings = [conversion for conversion in back if isinstance(conversion, WeightRenaming)]

    def saved(name: str) -> str:
        return rename_source_key(f"{name}.weight", renamings, [], reverse=True)[0]

    return {name: saved(name).removesuffix(".weight") for name in names}


def _conversions(model: Any) -> list[WeightTransform]:
    attached: list[WeightTransform] | None = getattr(model, "_weight_conversions", None)
    if attached is None:
        attached = get_model_conversion_mapping(model, add_legacy=False)
    return list(attached)


def _renamings(conversion: WeightTransform) -> list[WeightRenaming]:
    """Return a renaming per tensor for a conversion that merges experts, [] for others."""
    if not isinstance(conversion, WeightConverter) or len(conversion.target_patterns) != 1:
        return []
    merged = conversion.target_patterns[0].rpartition(".experts.")[2]
    sources = [_EXPERT_SOURCE.search(text) for text in conversion._original_source_patterns]
    targets = _MERGED.get(merged, ())
    if len(targets) != len(sources):
        return []
    renamings = []
    for target, source in zip(targets, sources, strict=True):
        if source is None:
            return []
        renaming = WeightRenaming(rf"\.experts\.(\d+)\.{source[1]}\.", rf".experts.\1.{target}.")
        renaming.scope_prefix = conversion.scope_prefix
        renaming.base_model_prefix = conversion.base_model_prefix
        renamings.append(renaming)
    return renamings
