"""A checkpoint rewritten into a new folder: packed, or unpacked for stock loaders.

The source is only read. Nothing in the new folder looks like a checkpoint until all of it is written (new_files.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from rac_modifier.checkpoint import detect
from rac_modifier.checkpoint.card import packed_card, unpacked_card
from rac_modifier.checkpoint.files import CONFIG_FILE, INDEX_FILE, JOURNAL_FILE, TensorFiles
from rac_modifier.checkpoint.formats import (
    FORMAT_24,
    PARTS,
    check_packed,
    packed_modules,
    packed_weight,
)
from rac_modifier.checkpoint.new_files import NewFiles
from rac_modifier.checkpoint.output_folder import check_output_folder
from rac_modifier.checkpoint.pack_plan import PackPlan
from rac_modifier.checkpoint.packing import PackSummary, rewrite, summary_from, write_packed
from rac_modifier.checkpoint.quantization_config import to_words, weight_schemes
from rac_modifier.checkpoint.record import CARD_NAME, RUN_RECORD_NAME, environment
from rac_modifier.checkpoint.sparsity_config import (
    QUANTIZATION_KEY,
    packed_format,
    recorded_structures,
    with_dense_mark,
)
from rac_modifier.checkpoint.stored_weight import UNSTRUCTURED, count_zeros
from rac_modifier.errors import RacError
from rac_modifier.files import read_json, without_paths, write_text_atomic

# Weights in other files than those that are packed: they would stay dense, or twice in the folder.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
_ROOM = 1 << 20  # bytes for small files
# Writes the new files of a checkpoint; returns the summary and the names of the changed files.
_Write = Callable[[TensorFiles, NewFiles], tuple[PackSummary, list[str]]]


def pack_model(plan: PackPlan, out: str | Path, base_model: str) -> PackSummary:
    """Write a packed checkpoint as planned, or finish the renames of an earlier call.

    Args:
        plan: of the source.
        out: a new or empty folder.
        base_model: hub id or folder that the card names.

    Raises:
        RacError: nothing gains from packing, `out` cannot be used, another process writes to
            it, or the disk is full; then `out` is as before.
    """
    plan.check_gain()
    config = read_json(plan.folder / CONFIG_FILE)

    def write(files: TensorFiles, new: NewFiles) -> tuple[PackSummary, list[str]]:
        convert = detect.without_negative_zeros if plan.drop_negative_zeros else None
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
        return summary, [*changed, RUN_RECORD_NAME, CARD_NAME]

    need = sum(file.stat().st_size for file in plan.folder.glob("*.safetensors"))
    return _rewrite("pack", plan.folder, Path(out), write, need)


def unpack_model(source: str | Path, out: str | Path) -> PackSummary:
    """Write a packed checkpoint dense, quantized weights in upstream's layout.

    Stock transformers and vLLM load it. `rac_sparsity` in its config.json, which they ignore,
    still lists the pruned modules.

    Raises:
        RacError: the source is not packed or damaged, and as `pack_model`.
    """
    source = Path(source)
    config = read_json(source / CONFIG_FILE)
    format = packed_format(config)
    if format is None:
        with TensorFiles(source) as files:
            check_packed(files, None)  # weights that are packed although config.json lost its entry
        raise RacError(
            f"{source}: is not packed, so stock loaders read it as it is; nothing to unpack"
        )

    def write(files: TensorFiles, new: NewFiles) -> tuple[PackSummary, list[str]]:
        summary, changed = _write_unpacked(files, format, config, new)
        new.write_json(CONFIG_FILE, with_dense_mark(config, recorded_structures(config)))
        if (record := _record(source)) is not None:
            unpacked = {key: value for key, value in record.items() if key != "packing"}
            new.write_json(RUN_RECORD_NAME, unpacked)
            write_text_atomic(new.path(CARD_NAME), unpacked_card(record, source))
            changed += [RUN_RECORD_NAME, CARD_NAME]
        return summary, changed

    return _rewrite("unpack", source, Path(out), write, 0)


def left_out(source: Path) -> list[str]:
    """List what of a folder is not part of the new one: folders, and weights in other files."""
    with TensorFiles(source) as files:
        used = set(files.where.values())
    used |= {path.name for path in _others(source)}
    used |= {INDEX_FILE, CONFIG_FILE, RUN_RECORD_NAME, CARD_NAME}
    return sorted(
        path.name for path in source.iterdir() if path.name not in used and path.name[0] != "."
    )


def _rewrite(kind: str, source: Path, out: Path, write: _Write, need: int) -> PackSummary:
    """Write the new folder in one step, and copy what `write` did not change."""
    job = f"{kind} {source.resolve()}"
    _check_links(source)
    with TensorFiles(source) as files:
        if not (out / JOURNAL_FILE).exists():
            check_output_folder(out, source, need + _ROOM)
        with NewFiles(out, create=True) as new:
            if (finished := new.finish(job, summary_from)) is not None:
                return finished
            # once more: another process may have filled it meanwhile
            check_output_folder(out, source, need + _ROOM)
            try:
                summary, changed = write(files, new)
                names = _copy_others(files, new, changed)
            except (OSError, SafetensorError) as error:
                raise RacError(
                    f"{out}: cannot be written ({error}); nothing is left of it, "
                    "make room and try again"
                ) from error
            # config.json last: before it is there, no loader takes the folder for a model.
            new.commit(job, [*names, CONFIG_FILE], asdict(summary))
    return summary


def _write_unpacked(
    files: TensorFiles, format: str, config: dict[str, Any], new: NewFiles
) -> tuple[PackSummary, list[str]]:
    schemes = weight_schemes(config.get(QUANTIZATION_KEY))
    in_words = set(check_packed(files, format, schemes))
    zeros = weights = 0

    def dense(module: str) -> dict[str, Tensor]:
        nonlocal zeros, weights
        stored = packed_weight(files, format, module, schemes)
        zeros, weights = zeros + count_zeros(stored), weights + stored.rows * stored.columns
        weight = stored.dense()
        return to_words(weight, stored.bits) if module in in_words else {"weight": weight}

    modules = packed_modules(files.where)
    removed = {f"{module}.{part}" for module in modules for part in PARTS[format]}
    new_weights = {f"{module}.compressed": partial(dense, module) for module in modules}
    before, after, changed = rewrite(files, new, removed, new_weights)
    default = "2:4" if format == FORMAT_24 else UNSTRUCTURED
    structures = {**dict.fromkeys(modules, default), **recorded_structures(config)}
    return PackSummary(format, structures, zeros / weights, after, before), changed


def _copy_others(files: TensorFiles, new: NewFiles, changed: list[str]) -> list[str]:
    """Copy what `changed` does not have, the files of weights too; return all names."""
    copies = {files.folder / file for file in files.where.values()} | set(_others(files.folder))
    if files.index is not None:
        copies.add(files.folder / INDEX_FILE)
    copies = {path for path in copies if path.name not in changed}
    for path in sorted(copies):
        new.copy(path)
    return [*changed, *sorted(path.name for path in copies)]


def _others(folder: Path) -> list[Path]:
    """List the files next to the weights: tokenizer, generation settings, licence, ..."""
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file()
        and path.name not in (CONFIG_FILE, INDEX_FILE)
        and path.name[0] != "."
        and not path.name.endswith((*_WEIGHTS, ".index.json"))
    ]


def _check_links(folder: Path) -> None:
    """Refuse links to files outside of the model; the hub's cache is made of links.

    Raises:
        RacError: naming the link and what it leads to.
    """
    home = folder.resolve()
    homes = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    for path in [*_others(folder), folder / CONFIG_FILE, folder / INDEX_FILE]:
        target = path.resolve()
        if path.is_symlink() and not any(target.is_relative_to(place) for place in homes):
            raise RacError(
                f"{path}: is a link to {target}, outside of the model; copy that file to {folder}, "
                "or remove the link"
            )


def _record(folder: Path) -> dict[str, Any] | None:
    path = folder / RUN_RECORD_NAME
    return without_paths(read_json(path)) if path.is_file() else None


def _figures(summary: PackSummary, plan: PackPlan) -> dict[str, Any]:
    """Return what the record of a packed model has of its packing."""
    return {
        "format": summary.format,
        "modules": dict(sorted(Counter(summary.modules.values()).items())),
        "sparsity": summary.global_sparsity,
        "dense_bytes": summary.dense_bytes,
        "packed_bytes": summary.packed_bytes,
        "negative_zeros": "dropped" if plan.drop_negative_zeros else "kept",
    }
