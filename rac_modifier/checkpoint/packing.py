"""Pack the dense weights of a saved folder in place; what pack and unpack share.

The disk needs room for both copies of the changed files. Memory is needed for the new tensors
of one file and for one tensor that is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from rac_modifier.checkpoint.files import CONFIG_FILE, INDEX_FILE, TensorFiles
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
    QUANTIZATION_KEY,
    packed_format,
    with_dense_mark,
    with_packed,
)
from rac_modifier.checkpoint.stored_weight import count_broken_groups, count_zeros
from rac_modifier.errors import RacError
from rac_modifier.files import read_json, write_json_atomic

IN_PLACE = "pack in place"  # the job's name in a journal


@dataclass(frozen=True)
class PackSummary:
    """What was packed or unpacked.

    modules: mask structure by module.
    global_sparsity: share of zeros in these modules.
    dense_bytes, packed_bytes: of their weights; scales are not counted.
    """

    format: str
    modules: dict[str, str]
    global_sparsity: float
    dense_bytes: int
    packed_bytes: int


def pack_checkpoint(
    folder: str | Path, modules: dict[str, str], dense_linears: Iterable[str] = ()
) -> PackSummary:
    """Pack the weights of `modules` in the folder, or finish the renames of an earlier call.

    Args:
        folder: a saved model, one safetensors file or shards with an index.
        modules: mask structure by module ("2:4", another "N:M", or "unstructured"), named as on
            disk: `<name>.weight` holds the pruned weight, quantized (int8, fp8) or not, or
            `<name>.weight_packed` in int32 words (int4, int8). The format is 2:4 only if all of
            them are 2:4.
        dense_linears: the other linear modules, which stay dense.

    Raises:
        RacError: a module without such a weight, a weight that breaks its mask structure, a
            folder that is packed already or that another process writes to, or a full disk. The
            folder is then unchanged.
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
                f"{folder}: packing failed ({error}); the folder is unchanged, make room and "
                "try again"
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
    convert: Callable[[Tensor], Tensor] | None = None,
) -> tuple[PackSummary, list[str]]:
    """Write what packing changes; return the summary and the names of the changed files.

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
    zeros = weights = 0

    def packed(module: str) -> dict[str, Tensor]:
        nonlocal zeros, weights
        weight, bits = _read_weight(files, module, schemes)
        weight = weight if convert is None else convert(weight)
        tensors = pack(weight, format, module, bits)  # first: it refuses what is no matrix
        if format != FORMAT_24:
            _check_structure(weight, structures[module], module)
        zeros, weights = zeros + count_zeros(weight), weights + weight.numel()
        return tensors

    new_weights: dict[str, Callable[[], dict[str, Tensor]]] = {}
    removed: set[str] = set()
    for module in structures:
        check_symmetric(files.where, module)
        stored = "weight" if f"{module}.weight" in files else WORDS
        new_weights[f"{module}.{stored}"] = partial(packed, module)
        removed |= {f"{module}.{part}" for part in (stored, WORDS_SHAPE)} & files.where.keys()
    before, after, changed = rewrite(files, new, removed, new_weights)
    summary = PackSummary(format, structures, zeros / weights, before, after)
    new.write_json(
        CONFIG_FILE, with_packed(config, format, structures, summary.global_sparsity, ignore)
    )
    return summary, changed


def rewrite(
    files: TensorFiles,
    new: NewFiles,
    removed: set[str],
    replacements: Mapping[str, Callable[[], dict[str, Tensor]]],
) -> tuple[int, int, list[str]]:
    """Write each file that holds a removed tensor anew, and the index.

    Args:
        files: the checkpoint that is read.
        new: where the files are written.
        removed: names of the tensors that are left out.
        replacements: by one removed tensor per module, a function that returns the tensors of
            this module by part.

    Returns:
        Bytes of the removed tensors, bytes of the new ones, and the names of the changed files.
    """
    where: dict[str, str] = {}
    changed: list[str] = []
    before, after = sum(files.nbytes(name) for name in removed), 0
    for file in sorted(set(files.where.values())):
        names = sorted(name for name, holder in files.where.items() if holder == file)
        where.update({name: file for name in names if name not in removed})
        if not removed & set(names):
            continue
        tensors = {name: files.tensor(name) for name in names if name not in removed}
        for name in (name for name in names if name in replacements):
            module = name.rpartition(".")[0]
            replacement = {
                f"{module}.{part}": tensor for part, tensor in replacements[name]().items()
            }
            after += sum(tensor.nbytes for tensor in replacement.values())
            tensors |= replacement
        where.update(dict.fromkeys(tensors, file))
        new.write_tensors(file, tensors, files.metadata(file))
        changed.append(file)
    if files.index is not None:
        new.write_json(INDEX_FILE, files.new_index(where, after - before))
        changed.append(INDEX_FILE)
    return before, after, changed


def mark_dense(folder: str | Path, modules: dict[str, str]) -> None:
    """Record in config.json that `modules` are pruned and stored dense.

    Args:
        folder: a saved model.
        modules: mask structure by module, as for `pack_checkpoint`. Asymmetrically quantized
            weights, whose zeros are zero points, and layouts that this package does not read
            are not checked.

    Raises:
        RacError: a packed folder, a module that is not in it, or a weight that breaks its mask
            structure.
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
            elif (stored := words_weight(files, name, schemes)) is not None:
                _check_structure(stored[0], structure, name)
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


def summary_from(recorded: dict[str, Any]) -> PackSummary:
    """Return the summary from `asdict` of it."""
    return PackSummary(**recorded)


def _read_weight(
    files: TensorFiles, name: str, schemes: tuple[WeightScheme, ...]
) -> tuple[Tensor, int | None]:
    """Return the weight [N, K] of a module, and bits per value if it is stored in int32 words."""
    if f"{name}.weight" in files:
        return files.tensor(f"{name}.weight"), None
    stored = words_weight(files, name, schemes)
    if stored is None:
        raise RacError(
            f"{name}: quantized to a layout that cannot be stored sparse; quantize to int of "
            "4 or 8 bits or to float8, or store it dense (storage: dense)"
        )
    return stored


def _check_structure(weight: Tensor, structure: str, name: str) -> None:
    broken = count_broken_groups(weight, structure, name)
    if broken:
        raise RacError(
            f"{name}: {broken} groups break {structure}; prune it again, or name it unstructured"
        )
