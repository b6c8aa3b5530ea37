"""Turn a saved folder of dense safetensors into a packed one, in place, and never into a half-packed one.

All new files are first written beside the old ones under temporary names: after a full disk or a crash up to there, the
old checkpoint is unchanged. Then a journal that lists the renames is written, the renames are made, and the journal is
removed. After a crash between two renames the journal is still there: `TensorFiles` refuses the folder, and the next
`pack_checkpoint` makes the remaining renames. config.json is renamed first: from then on, a loader that cannot unpack
refuses the folder.

This takes disk space for both copies of the changed files, and memory for the packed weights of one file.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from rac_modifier.checkpoint.bitmask import count_zeros
from rac_modifier.checkpoint.files import INDEX_FILE, JOURNAL_FILE, TensorFiles
from rac_modifier.checkpoint.formats import FORMAT_24, choose_format, pack, packed_modules, structure_of
from rac_modifier.checkpoint.quantization_config import (
    WORDS,
    WORDS_SHAPE,
    WeightScheme,
    check_symmetric,
    check_unambiguous,
    weight_schemes,
    words_weight,
)
from rac_modifier.checkpoint.sparsity_config import (
    CONFIG_FILE,
    QUANTIZATION_KEY,
    packed_format,
    with_dense_mark,
    with_packed,
)
from rac_modifier.checkpoint.stored_weight import count_broken_groups
from rac_modifier.errors import RacError
from rac_modifier.files import read_json, write_json_atomic

_TEMPORARY = ".rac_new."


@dataclass(frozen=True)
class PackedModule:
    """One module: its mask structure, its share of zeros, and its weight's bytes before and after."""

    name: str
    structure: str
    rows: int
    columns: int
    sparsity: float
    dense_bytes: int
    packed_bytes: int


@dataclass(frozen=True)
class PackSummary:
    """What was packed; `global_sparsity` is the share of zeros in the packed modules."""

    format: str
    modules: tuple[PackedModule, ...]
    global_sparsity: float
    dense_bytes: int
    packed_bytes: int


def pack_checkpoint(folder: str | Path, modules: dict[str, str], dense_linears: Iterable[str] = ()) -> PackSummary:
    """Pack the weights of `modules` in the folder. If an earlier call was cut off while it renamed files, finish that one.

    Args:
        folder: a saved model, one safetensors file or shards with an index.
        modules: mask structure by module ("2:4", another "N:M", or "unstructured"), named as on disk: `<name>.weight`
            holds the pruned weight, quantized (int8, fp8) or not, or `<name>.weight_packed` in int32 words (int4, int8).
            The format is 2:4 only if all of them are 2:4.
        dense_linears: the other linear modules, which stay dense.

    Raises:
        RacError: a module without such a weight, a weight that breaks its mask structure, a folder that is packed already,
            or a full disk. The folder is then unchanged.
    """
    folder = Path(folder)
    if (folder / JOURNAL_FILE).exists():
        return _commit(folder)
    _remove_temporaries(folder)
    config = read_json(folder / CONFIG_FILE)
    structures = {name: structure_of(value, name) for name, value in sorted(modules.items())}
    ignore = sorted(set(dense_linears))
    if not structures:
        raise RacError(f"{folder}: no modules to pack were named; name the pruned linear modules")
    if both := sorted(set(ignore) & set(structures)):
        raise RacError(f"{both[0]}: named both as pruned and as left dense; name it once")
    try:
        with TensorFiles(folder) as files:
            _check_unpacked(files, config, structures)
            check_unambiguous(weight_schemes(config.get(QUANTIZATION_KEY)))
            for name in structures:
                check_symmetric(files.where, name)
            summary, changed = _write_new_files(files, config, structures, ignore)
        _sync_folder(folder)
    except (OSError, SafetensorError) as error:
        _remove_temporaries(folder)
        raise RacError(
            f"{folder}: packing failed ({error}); the folder is unchanged, make room and try again"
        ) from error
    except BaseException:
        _remove_temporaries(folder)
        raise
    # Outside the handlers above: once the journal may be there, the new files must not be removed.
    write_json_atomic(folder / JOURNAL_FILE, {"files": changed, "summary": asdict(summary)})
    return _commit(folder)


def mark_dense(folder: str | Path, modules: dict[str, str]) -> None:
    """Record in config.json that `modules` are pruned but stored dense; stock loaders ignore that entry.

    Args:
        folder: a saved model.
        modules: mask structure by module, as for `pack_checkpoint`. Asymmetrically quantized weights, whose zeros are zero
            points, and layouts that this package does not read are not checked.

    Raises:
        RacError: a packed folder, a module that is not in it, or a weight that breaks its mask structure.
    """
    config = read_json(Path(folder) / CONFIG_FILE)
    structures = {name: structure_of(value, name) for name, value in sorted(modules.items())}
    schemes = weight_schemes(config.get(QUANTIZATION_KEY))
    with TensorFiles(folder) as files:
        _check_unpacked(files, config, structures)
        for name, structure in structures.items():
            if f"{name}.weight_zero_point" in files:
                continue
            if f"{name}.weight" in files:
                _check_structure(files.tensor(f"{name}.weight"), structure, name)
            elif (unpacked := words_weight(files, name, schemes)) is not None:
                _check_structure(unpacked[0], structure, name)
    write_json_atomic(Path(folder) / CONFIG_FILE, with_dense_mark(config, structures))


def _check_unpacked(files: TensorFiles, config: dict[str, Any], names: Iterable[str]) -> None:
    if packed_format(config) or packed_modules(files.where):
        raise RacError(f"{files.folder}: is packed already; start from the dense checkpoint")
    for name in names:
        if not any(f"{name}.{part}" in files for part in ("weight", WORDS)):
            raise RacError(f"{name}.weight: not in {files.folder}; name modules as the saved files do")


def _read_weight(files: TensorFiles, name: str, schemes: tuple[WeightScheme, ...]) -> tuple[Tensor, int | None, int]:
    """The weight [N, K] of a module, bits per value if it is stored in int32 words, and its bytes in the file."""
    if f"{name}.weight" in files:
        weight = files.tensor(f"{name}.weight")
        return weight, None, weight.nbytes
    unpacked = words_weight(files, name, schemes)
    if unpacked is None:
        raise RacError(
            f"{name}: quantized to a layout that cannot be stored sparse; quantize to int of 4 or 8 bits or to float8, or "
            "store it dense (storage: dense)"
        )
    return *unpacked, files.nbytes(f"{name}.{WORDS}")


def _check_structure(weight: Tensor, structure: str, name: str) -> None:
    broken = count_broken_groups(weight, structure, name)
    if broken:
        raise RacError(f"{name}: {broken} groups break {structure}; prune it again, or name it unstructured")


def _write_new_files(
    files: TensorFiles, config: dict[str, Any], structures: dict[str, str], ignore: list[str]
) -> tuple[PackSummary, list[str]]:
    """Write every changed file under its temporary name; return their final names in the order of renaming."""
    format = choose_format(structures.values())
    schemes = weight_schemes(config.get(QUANTIZATION_KEY))
    packed: list[PackedModule] = []
    changed = [CONFIG_FILE]
    where: dict[str, str] = {}
    weights = {f"{module}.{part}": module for module in structures for part in ("weight", WORDS)}
    replaced = {*weights, *(f"{module}.{WORDS_SHAPE}" for module in structures)}
    for file in sorted(set(files.where.values())):
        names = sorted(name for name, holder in files.where.items() if holder == file)
        if not replaced & set(names):
            where.update(dict.fromkeys(names, file))
            continue
        tensors = {name: files.tensor(name) for name in names if name not in replaced}
        for module in (weights[name] for name in names if name in weights):
            row, parts = _pack_module(*_read_weight(files, module, schemes), format, structures[module], module)
            packed.append(row)
            tensors.update({f"{module}.{part}": tensor for part, tensor in parts.items()})
        where.update(dict.fromkeys(tensors, file))
        _save(tensors, files.folder / (_TEMPORARY + file), files.metadata(file))
        changed.append(file)
    summary = PackSummary(
        format=format,
        modules=tuple(sorted(packed, key=lambda module: module.name)),
        global_sparsity=sum(m.sparsity * m.rows * m.columns for m in packed) / sum(m.rows * m.columns for m in packed),
        dense_bytes=sum(module.dense_bytes for module in packed),
        packed_bytes=sum(module.packed_bytes for module in packed),
    )
    write_json_atomic(
        files.folder / (_TEMPORARY + CONFIG_FILE),
        with_packed(config, format, structures, summary.global_sparsity, ignore),
    )
    if files.index is not None:
        saved = summary.dense_bytes - summary.packed_bytes
        write_json_atomic(files.folder / (_TEMPORARY + INDEX_FILE), _new_index(files, where, saved))
        changed.append(INDEX_FILE)
    return summary, changed


def _pack_module(
    weight: Tensor, bits: int | None, dense_bytes: int, format: str, structure: str, name: str
) -> tuple[PackedModule, dict[str, Tensor]]:
    parts = pack(weight, format, name, bits)  # first, since it refuses what is not a matrix
    if format != FORMAT_24:
        _check_structure(weight, structure, name)
    row = PackedModule(
        name=name,
        structure=structure,
        rows=weight.shape[0],
        columns=weight.shape[1],
        sparsity=count_zeros(weight) / weight.numel(),
        dense_bytes=dense_bytes,
        packed_bytes=sum(part.nbytes for part in parts.values()),
    )
    return row, parts


def _new_index(files: TensorFiles, where: dict[str, str], saved: int) -> dict[str, Any]:
    assert files.index is not None
    metadata = files.index.get("metadata")
    metadata = dict(metadata) if isinstance(metadata, dict) else {}
    total = metadata.get("total_size")
    if not isinstance(total, (int, float)):
        total = sum(files.nbytes(name) for name in files.where)
    metadata["total_size"] = int(total) - saved
    return {**files.index, "metadata": metadata, "weight_map": dict(sorted(where.items()))}


def _save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=metadata)
    os.chmod(path, 0o644)
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _commit(folder: Path) -> PackSummary:
    """Make the renames of the journal that are not made yet, and remove the journal."""
    journal = read_json(folder / JOURNAL_FILE)
    try:
        files, summary = journal["files"], _summary_from(journal["summary"])
        if any(Path(file).name != file for file in files):
            raise ValueError(f"a file name in {files} leads out of the folder")
    except (KeyError, TypeError, ValueError) as error:
        raise RacError(f"{folder / JOURNAL_FILE}: is damaged ({error!r}); save the model again") from error
    for file in files:
        # A missing file has been renamed before. Any other error stops here, and the journal stays.
        with contextlib.suppress(FileNotFoundError):
            os.replace(folder / (_TEMPORARY + file), folder / file)
    _sync_folder(folder)
    (folder / JOURNAL_FILE).unlink()
    return summary


def _summary_from(recorded: dict[str, Any]) -> PackSummary:
    return PackSummary(**{**recorded, "modules": tuple(PackedModule(**module) for module in recorded["modules"])})


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove_temporaries(folder: Path) -> None:
    for path in folder.glob(f"{_TEMPORARY}*"):
        path.unlink()
