"""Pack dense safetensors: a saved folder in place, or as new files elsewhere; never into a half-packed checkpoint.

This takes disk space for both copies of the changed files, and memory for the packed weights of one file and one dense
weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from rac_modifier.checkpoint.bitmask import count_zeros
from rac_modifier.checkpoint.files import INDEX_FILE, TensorFiles
from rac_modifier.checkpoint.formats import (
    FORMAT_24,
    choose_format,
    pack,
    packed_modules,
    structure_of,
)
from rac_modifier.checkpoint.new_files import NewFiles
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

IN_PLACE = "pack in place"  # the job's name in a journal


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


def pack_checkpoint(
    folder: str | Path, modules: dict[str, str], dense_linears: Iterable[str] = ()
) -> PackSummary:
    """Pack the weights of `modules` in the folder. If an earlier call was cut off while it renamed files, finish that one.

    Args:
        folder: a saved model, one safetensors file or shards with an index.
        modules: mask structure by module ("2:4", another "N:M", or "unstructured"), named as on disk: `<name>.weight`
            holds the pruned weight, quantized (int8, fp8) or not, or `<name>.weight_packed` in int32 words (int4, int8).
            The format is 2:4 only if all of them are 2:4.
        dense_linears: the other linear modules, which stay dense.

    Raises:
        RacError: a module without such a weight, a weight that breaks its mask structure, a folder that is packed already
            or that another process writes to, or a full disk. The folder is then unchanged.
    """
    folder = Path(folder)
    config = read_json(folder / CONFIG_FILE)
    with NewFiles(folder) as new:
        if (finished := new.finish(IN_PLACE, summary_from)) is not None:
            return finished
        structures = {name: structure_of(value, name) for name, value in sorted(modules.items())}
        ignore = sorted(set(dense_linears))
        if not structures:
            raise RacError(
                f"{folder}: no modules to pack were named; name the pruned linear modules"
            )
        if both := sorted(set(ignore) & set(structures)):
            raise RacError(f"{both[0]}: named both as pruned and as left dense; name it once")
        try:
            with TensorFiles(folder) as files:
                format = choose_format(structures.values())
                summary, changed = write_packed(files, config, structures, ignore, format, new)
        except (OSError, SafetensorError) as error:
            raise RacError(
                f"{folder}: packing failed ({error}); the folder is unchanged, make room and try again"
            ) from error
        # config.json first: from then on, a loader that cannot unpack refuses the folder.
        new.commit(IN_PLACE, [CONFIG_FILE, *changed], asdict(summary))
    return summary


def write_packed(
    files: TensorFiles,
    config: dict[str, Any],
    structures: dict[str, str],
    ignore: list[str],
    format: str,
    new: NewFiles,
    convert: Callable[[Tensor], Tensor] = lambda weight: weight,
) -> tuple[PackSummary, list[str]]:
    """Write config.json and every file that packing changes as new files; the names of the changed files.

    Args:
        files: the dense checkpoint.
        config: its config.json.
        structures: mask structure by module.
        ignore: the linear modules that stay dense.
        format: of all packed modules.
        new: where the files are written.
        convert: applied to each weight before it is packed.

    Raises:
        RacError: a checkpoint that is packed already, or a weight that cannot be packed.
    """
    check_unpacked(files, config, structures)
    schemes = weight_schemes(config.get(QUANTIZATION_KEY))
    check_unambiguous(schemes)
    for name in structures:
        check_symmetric(files.where, name)
    packed: list[PackedModule] = []
    changed: list[str] = []
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
            row, parts = _pack_module(
                *_read_weight(files, module, schemes, convert), format, structures[module], module
            )
            packed.append(row)
            tensors.update({f"{module}.{part}": tensor for part, tensor in parts.items()})
        where.update(dict.fromkeys(tensors, file))
        new.write_tensors(file, tensors, files.metadata(file))
        changed.append(file)
    summary = PackSummary(
        format=format,
        modules=tuple(sorted(packed, key=lambda module: module.name)),
        global_sparsity=sum(m.sparsity * m.rows * m.columns for m in packed)
        / sum(m.rows * m.columns for m in packed),
        dense_bytes=sum(module.dense_bytes for module in packed),
        packed_bytes=sum(module.packed_bytes for module in packed),
    )
    new.write_json(
        CONFIG_FILE, with_packed(config, format, structures, summary.global_sparsity, ignore)
    )
    if files.index is not None:
        new.write_json(
            INDEX_FILE, files.new_index(where, summary.packed_bytes - summary.dense_bytes)
        )
        changed.append(INDEX_FILE)
    return summary, changed


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
        check_unpacked(files, config, structures)
        for name, structure in structures.items():
            if f"{name}.weight_zero_point" in files:
                continue
            if f"{name}.weight" in files:
                _check_structure(files.tensor(f"{name}.weight"), structure, name)
            elif (unpacked := words_weight(files, name, schemes)) is not None:
                _check_structure(unpacked[0], structure, name)
    write_json_atomic(Path(folder) / CONFIG_FILE, with_dense_mark(config, structures))


def check_unpacked(files: TensorFiles, config: dict[str, Any], names: Iterable[str] = ()) -> None:
    """Refuse a packed checkpoint, and names of modules that it does not have.

    Raises:
        RacError: naming the module.
    """
    if packed_format(config) or packed_modules(files.where):
        raise RacError(f"{files.folder}: is packed already; start from the dense checkpoint")
    for name in names:
        if not any(f"{name}.{part}" in files for part in ("weight", WORDS)):
            raise RacError(
                f"{name}.weight: not in {files.folder}; name modules as the saved files do"
            )


def _read_weight(
    files: TensorFiles,
    name: str,
    schemes: tuple[WeightScheme, ...],
    convert: Callable[[Tensor], Tensor],
) -> tuple[Tensor, int | None, int]:
    """The weight [N, K] of a module, bits per value if it is stored in int32 words, and its bytes in the file."""
    if f"{name}.weight" in files:
        return convert(files.tensor(f"{name}.weight")), None, files.nbytes(f"{name}.weight")
    unpacked = words_weight(files, name, schemes)
    if unpacked is None:
        raise RacError(
            f"{name}: quantized to a layout that cannot be stored sparse; quantize to int of 4 or 8 bits or to float8, or "
            "store it dense (storage: dense)"
        )
    weight, bits = unpacked
    return convert(weight), bits, files.nbytes(f"{name}.{WORDS}")


def _check_structure(weight: Tensor, structure: str, name: str) -> None:
    broken = count_broken_groups(weight, structure, name)
    if broken:
        raise RacError(
            f"{name}: {broken} groups break {structure}; prune it again, or name it unstructured"
        )


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


def summary_from(recorded: dict[str, Any]) -> PackSummary:
    """The summary from `asdict` of it."""
    return PackSummary(
        **{**recorded, "modules": tuple(PackedModule(**module) for module in recorded["modules"])}
    )
