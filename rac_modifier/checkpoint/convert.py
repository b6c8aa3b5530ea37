"""A checkpoint rewritten into a new folder: packed, or unpacked to what stock loaders read. The source is only read.

Nothing in the new folder looks like a checkpoint until all of it is written (new_files.py). It is read tensor by tensor and
written file by file: memory is needed for the new tensors of one file, and for one tensor that is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from rac_modifier.checkpoint import detect
from rac_modifier.checkpoint.files import INDEX_FILE, JOURNAL_FILE, TensorFiles
from rac_modifier.checkpoint.formats import PARTS, packed_modules, unpack
from rac_modifier.checkpoint.license import CARD_NAME
from rac_modifier.checkpoint.new_files import NewFiles
from rac_modifier.checkpoint.output_folder import check_output_folder
from rac_modifier.checkpoint.pack_plan import PackPlan
from rac_modifier.checkpoint.packed_card import packed_card, unpacked_card
from rac_modifier.checkpoint.packed_names import check_packed
from rac_modifier.checkpoint.packing import PackSummary, summary_from, write_packed
from rac_modifier.checkpoint.quantization_config import to_words, weight_schemes
from rac_modifier.checkpoint.record import RUN_RECORD_NAME, environment
from rac_modifier.checkpoint.sparsity_config import (
    CONFIG_FILE,
    QUANTIZATION_KEY,
    packed_format,
    recorded_structures,
    with_dense_mark,
)
from rac_modifier.errors import RacError
from rac_modifier.files import read_json, write_text_atomic
from rac_modifier.machine_paths import without_paths

# Weights in other files than those that are packed: they would stay dense, or twice in the folder.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
_ROOM = 1 << 20  # bytes for small files


@dataclass(frozen=True)
class UnpackSummary:
    """What was unpacked: the modules, and the bytes of their weights before and after."""

    modules: tuple[str, ...]
    packed_bytes: int
    dense_bytes: int


def pack_model(plan: PackPlan, out: str | Path, base_model: str) -> PackSummary:
    """Write a packed checkpoint as planned. If an earlier call was cut off while it renamed files, finish that one.

    Args:
        plan: of the source.
        out: a new or empty folder.
        base_model: hub id or folder that the card names.

    Raises:
        RacError: nothing gains from packing, `out` cannot be used, another process writes to it, or the disk is full; then
            `out` is as before.
    """
    out = Path(out)
    plan.check_gain()
    config = read_json(plan.folder / CONFIG_FILE)

    def write(files: TensorFiles, new: NewFiles) -> tuple[dict[str, Any], list[str]]:
        convert: Callable[[Tensor], Tensor] = (
            detect.without_negative_zeros if plan.drop_negative_zeros else _same
        )
        summary, changed = write_packed(
            files, config, plan.structures, plan.ignore, plan.format or "", new, convert
        )
        record = _record(plan.folder) or {
            "base_model": base_model,
            "packing": _figures(summary, plan),
            "versions": environment(),
        }
        record = without_paths(record)
        new.write_json(RUN_RECORD_NAME, record)
        write_text_atomic(new.path(CARD_NAME), packed_card(record, plan.folder))
        return asdict(summary), [*changed, RUN_RECORD_NAME, CARD_NAME]

    return _rewrite("pack", plan.folder, out, write, summary_from)


def unpack_model(source: str | Path, out: str | Path) -> UnpackSummary:
    """Write a packed checkpoint with dense weights, quantized ones in upstream's layout, and without a `sparsity_config`.

    Stock transformers and vLLM load it. `rac_sparsity` in its config.json, which they ignore, still lists the pruned modules.

    Raises:
        RacError: the source is not packed or damaged, and as `pack_model`.
    """
    source, out = Path(source), Path(out)
    config = read_json(source / CONFIG_FILE)
    format = packed_format(config)
    schemes = weight_schemes(config.get(QUANTIZATION_KEY))

    def write(files: TensorFiles, new: NewFiles) -> tuple[dict[str, Any], list[str]]:
        in_words = set(check_packed(files, format, schemes))
        assert format is not None
        summary, changed = _write_unpacked(files, format, in_words, new)
        new.write_json(CONFIG_FILE, with_dense_mark(config, recorded_structures(config)))
        if (record := _record(source)) is not None:
            new.write_json(
                RUN_RECORD_NAME, {key: value for key, value in record.items() if key != "packing"}
            )
            write_text_atomic(new.path(CARD_NAME), unpacked_card(record, source))
            changed += [RUN_RECORD_NAME, CARD_NAME]
        return asdict(summary), changed

    if format is None:
        with TensorFiles(source) as files:
            check_packed(files, None)  # weights that are packed although config.json lost its entry
        raise RacError(
            f"{source}: is not packed, so stock loaders read it as it is; nothing to unpack"
        )
    return _rewrite("unpack", source, out, write, _unpack_summary_from)


def left_out(source: Path) -> list[str]:
    """What of a folder is not part of the new one: folders, hidden files and weights in other files."""
    with TensorFiles(source) as files:
        used = set(files.where.values())
    copied = {path.name for path in _others(source)}
    known = {*used, *copied, INDEX_FILE, CONFIG_FILE, RUN_RECORD_NAME, CARD_NAME}
    return sorted(
        path.name for path in source.iterdir() if path.name not in known and path.name[0] != "."
    )


def _rewrite(
    kind: str,
    source: Path,
    out: Path,
    write: Callable[[TensorFiles, NewFiles], tuple[dict[str, Any], list[str]]],
    parse: Callable[[Any], Any],
) -> Any:
    job = f"{kind} {source.resolve()}"
    _check_links(source)
    with TensorFiles(source) as files:
        need = (
            sum((source / file).stat().st_size for file in set(files.where.values()))
            if kind == "pack"
            else 0
        )
        if not (out / JOURNAL_FILE).exists():
            check_output_folder(out, source, need + _ROOM)
        with NewFiles(out, create=True) as new:
            if (finished := new.finish(job, parse)) is not None:
                return finished
            check_output_folder(
                out, source, need + _ROOM
            )  # once more: another process may have filled it meanwhile
            try:
                summary, changed = write(files, new)
                names = _copy_others(files, new, changed)
            except (OSError, SafetensorError) as error:
                raise RacError(
                    f"{out}: cannot be written ({error}); nothing is left of it, make room and try again"
                ) from error
            # config.json last: before it is there, no loader takes the folder for a model.
            new.commit(job, [*names, CONFIG_FILE], summary)
    return parse(summary)


def _copy_others(files: TensorFiles, new: NewFiles, changed: list[str]) -> list[str]:
    """Copy what `changed` does not have, the files of weights too; all names."""
    copies = {files.folder / file for file in files.where.values()} | set(_others(files.folder))
    if files.index is not None:
        copies.add(files.folder / INDEX_FILE)
    copies = {path for path in copies if path.name not in changed}
    for path in sorted(copies):
        new.copy(path)
    return [*changed, *sorted(path.name for path in copies)]


def _others(folder: Path) -> list[Path]:
    """The files beside the weights: tokenizer, generation settings, licence, ..."""
    made = {CONFIG_FILE, INDEX_FILE}
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file()
        and path.name not in made
        and path.name[0] != "."
        and not path.name.endswith(_WEIGHTS)
        and not path.name.endswith(".index.json")
    ]


def _check_links(folder: Path) -> None:
    """Refuse links that would copy a file from elsewhere into the new folder; the hub's cache is made of links.

    Raises:
        RacError: naming the link and what it leads to.
    """
    home = folder.resolve()
    homes = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    for path in [*_others(folder), folder / CONFIG_FILE, folder / INDEX_FILE]:
        target = path.resolve()
        if path.is_symlink() and not any(target.is_relative_to(place) for place in homes):
            raise RacError(
                f"{path}: is a link to {target}, outside of the model; copy that file here, or remove the link"
            )


def _write_unpacked(
    files: TensorFiles, format: str, in_words: set[str], new: NewFiles
) -> tuple[UnpackSummary, list[str]]:
    changed: list[str] = []
    where: dict[str, str] = {}
    modules: list[str] = []
    packed_bytes = dense_bytes = 0
    packed = {
        f"{module}.{part}" for module in packed_modules(files.where) for part in PARTS[format]
    }
    for file in sorted(set(files.where.values())):
        names = sorted(name for name, holder in files.where.items() if holder == file)
        tensors = {name: files.tensor(name) for name in names if name not in packed}
        for module in (
            name.removesuffix(".compressed") for name in names if name.endswith(".compressed")
        ):
            parts = {part: files.tensor(f"{module}.{part}") for part in PARTS[format]}
            dense = _dense(parts, format, module, module in in_words)
            packed_bytes += sum(files.nbytes(f"{module}.{part}") for part in PARTS[format])
            dense_bytes += sum(tensor.nbytes for tensor in dense.values())
            tensors.update(dense)
            modules.append(module)
        where.update(dict.fromkeys(tensors, file))
        if packed & set(names):
            new.write_tensors(file, tensors, files.metadata(file))
            changed.append(file)
    if files.index is not None:
        new.write_json(INDEX_FILE, files.new_index(where, dense_bytes - packed_bytes))
        changed.append(INDEX_FILE)
    return UnpackSummary(tuple(sorted(modules)), packed_bytes, dense_bytes), changed


def _dense(
    parts: Mapping[str, Tensor], format: str, module: str, in_words: bool
) -> dict[str, Tensor]:
    weight = unpack(parts, format, module)
    if not in_words:
        return {f"{module}.weight": weight}
    bits = 4 if parts["compressed"].dtype == torch.int32 else 8
    return {f"{module}.{part}": tensor for part, tensor in to_words(weight, bits).items()}


def _record(folder: Path) -> dict[str, Any] | None:
    path = folder / RUN_RECORD_NAME
    return without_paths(read_json(path)) if path.is_file() else None


def _figures(summary: PackSummary, plan: PackPlan) -> dict[str, Any]:
    """What the record of a packed model has of its packing."""
    structures = [module.structure for module in summary.modules]
    return {
        "format": summary.format,
        "modules": {
            structure: structures.count(structure) for structure in sorted(set(structures))
        },
        "sparsity": summary.global_sparsity,
        "dense_bytes": summary.dense_bytes,
        "packed_bytes": summary.packed_bytes,
        "negative_zeros": "dropped" if plan.drop_negative_zeros else "kept",
    }


def _unpack_summary_from(recorded: dict[str, Any]) -> UnpackSummary:
    return UnpackSummary(**{**recorded, "modules": tuple(recorded["modules"])})


def _same(weight: Tensor) -> Tensor:
    return weight
