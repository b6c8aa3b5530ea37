"""Checkpoints packed, in place or into a new folder, and unpacked for stock loaders.

The disk needs room for both copies of the changed files. Memory is needed for the new tensors
of one file and for one tensor that is read. The source of a new folder is only read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from rac_modifier.checkpoint.card import packed_card, unpacked_card
from rac_modifier.checkpoint.dense_codes import WORDS, WORDS_SHAPE, to_words, words_of
from rac_modifier.checkpoint.files import CONFIG_FILE, INDEX_FILE, TensorFiles
from rac_modifier.checkpoint.formats import (
    FORMAT_24,
    PARTS,
    check_packed,
    choose_format,
    pack,
    packed_modules,
    packed_weight,
    structure_of,
)
from rac_modifier.checkpoint.output_folder import NewFiles, check_output_folder
from rac_modifier.checkpoint.pack_plan import (
    ASYMMETRIC,
    PackPlan,
    check_unpacked,
    without_negative_zeros,
)
from rac_modifier.checkpoint.quantization_config import (
    QUANTIZATION_KEY,
    SparsityRecord,
    int8_in_words,
    packed_format,
    weight_schemes,
    with_dense_mark,
    with_packed,
)
from rac_modifier.checkpoint.record import CARD_NAME, RUN_RECORD_NAME, environment
from rac_modifier.checkpoint.stored_weight import UNSTRUCTURED, count_broken_groups, count_zeros
from rac_modifier.errors import RacError
from rac_modifier.files import read_json, without_paths, write_json_atomic, write_text_atomic

# Weights in other files than those that are packed: they would stay dense, or twice in the folder.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
_SMALL_FILES = 1 << 20  # bytes


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
    """Pack the weights of `modules` in the folder.

    Args:
        folder: a saved model, one safetensors file or shards with an index.
        modules: mask structure by module ("2:4", another "N:M", or "unstructured"), named as on
            disk: `<name>.weight` holds the pruned weight, quantized (int8, fp8) or not, or
            `<name>.weight_packed` in int32 words (int4, int8).
        dense_linears: the other linear modules, which stay dense.

    Raises:
        RacError: a module that cannot be packed, a folder that is packed already or that another
            process writes to, or a full disk. The folder is then unchanged.
    """
    folder = Path(folder)
    config = read_json(folder / CONFIG_FILE)
    structures = {name: structure_of(value, name) for name, value in sorted(modules.items())}
    ignore = set(dense_linears)
    if not structures:
        raise RacError(f"{folder}: no modules to pack were named; name the pruned linear modules")
    if duplicates := sorted(ignore & structures.keys()):
        raise RacError(f"{duplicates[0]}: named both as pruned and as left dense; name it once")
    with TensorFiles(folder) as files, NewFiles(folder) as new:
        format = choose_format(structures.values())
        return _write_packed(files, config, structures, ignore, format, new)


def mark_dense(folder: str | Path, modules: dict[str, str]) -> None:
    """Record in config.json of a model that is not packed that `modules` are pruned (RacError)."""
    config = read_json(Path(folder) / CONFIG_FILE)
    structures = {name: structure_of(value, name) for name, value in sorted(modules.items())}
    with TensorFiles(folder) as files:
        check_unpacked(files, config)
    write_json_atomic(Path(folder) / CONFIG_FILE, with_dense_mark(config, structures))


def pack_model(plan: PackPlan, out: str | Path, base_model: str) -> PackSummary:
    """Write a packed checkpoint as planned.

    `out` is a new or empty folder; `base_model` is the hub id or folder that the card names.

    Raises:
        RacError: nothing gains from packing, or `out` cannot be written to and is as before.
    """
    plan.check_gain()
    source, dropped = plan.folder, plan.drop_negative_zeros
    config = read_json(source / CONFIG_FILE)
    need = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    with _new_folder(source, Path(out), need) as (files, new):
        convert = without_negative_zeros if dropped else None
        summary = _write_packed(
            files, config, plan.structures, plan.ignore, plan.format or "", new, convert
        )
        figures = {
            **asdict(summary),
            "modules": dict(sorted(Counter(summary.modules.values()).items())),
            "negative_zeros": "dropped" if dropped else "kept",
        }
        run = {"base_model": base_model, "packing": figures, "versions": environment()}
        record = without_paths(_record(source) or run)
        new.write_json(RUN_RECORD_NAME, record)
        write_text_atomic(new.path(CARD_NAME), packed_card(record, source))
    return summary


def unpack_model(source: str | Path, out: str | Path) -> PackSummary:
    """Write a packed checkpoint dense, which stock transformers and vLLM load.

    Quantized weights have upstream's layout; `rac_sparsity` still lists the pruned modules.

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
    schemes = weight_schemes(config.get(QUANTIZATION_KEY))
    recorded = SparsityRecord.of(config).modules
    zeros = weights = 0
    with _new_folder(source, Path(out), 0) as (files, new):
        in_words = set(check_packed(files, format, schemes))

        def dense(module: str) -> dict[str, Tensor]:
            nonlocal zeros, weights
            stored = packed_weight(files, format, module, schemes)
            zeros, weights = zeros + count_zeros(stored), weights + stored.rows * stored.columns
            weight = stored.dense()
            return to_words(weight, stored.bits) if module in in_words else {"weight": weight}

        modules = packed_modules(files.where)
        replacements = {module: partial(dense, module) for module in modules}
        before, after = _rewrite(files, new, PARTS[format], replacements)
        new.write_json(CONFIG_FILE, with_dense_mark(config, recorded))
        if record := _record(source):
            unpacked = {key: value for key, value in record.items() if key != "packing"}
            new.write_json(RUN_RECORD_NAME, without_paths(unpacked))
            write_text_atomic(new.path(CARD_NAME), unpacked_card(record, source))
    default = "2:4" if format == FORMAT_24 else UNSTRUCTURED
    structures = {**dict.fromkeys(modules, default), **recorded}
    return PackSummary(format, structures, zeros / weights, after, before)


def left_out(source: Path) -> list[str]:
    """List what of a folder is not part of the new one: folders, and weights in other files."""
    with TensorFiles(source) as files:
        used = {*files.where.values(), *(path.name for path in _others(source))}
    used |= {INDEX_FILE, CONFIG_FILE, RUN_RECORD_NAME, CARD_NAME}
    names = (path.name for path in source.iterdir())
    return sorted(name for name in names if name not in used and name[0] != ".")


@contextmanager
def _new_folder(source: Path, out: Path, need: int) -> Iterator[tuple[TensorFiles, NewFiles]]:
    """Copy what the body does not write: the other files of the source."""
    _check_links(source)
    with TensorFiles(source) as files:
        check_output_folder(out, source, need + _SMALL_FILES)
        with NewFiles(out) as new:
            yield files, new
            weights = [*files.where.values(), *([INDEX_FILE] if files.index else [])]
            for path in {*(source / name for name in weights), *_others(source)}:
                if not new.path(path.name).exists():
                    new.copy(path)


def _write_packed(
    files: TensorFiles,
    config: dict[str, Any],
    structures: dict[str, str],
    ignore: Iterable[str],
    format: str,
    new: NewFiles,
    convert: Callable[[Tensor], Tensor] | None = None,
) -> PackSummary:
    """Write the files that packing changes; `convert` is applied to each weight before it."""
    check_unpacked(files, config)
    schemes = weight_schemes(config.get(QUANTIZATION_KEY))
    int8_in_words(schemes)  # refuses both layouts of int8 in one checkpoint
    zeros = weights = 0

    def packed(module: str) -> dict[str, Tensor]:
        nonlocal zeros, weights
        for part in ASYMMETRIC:
            if f"{module}.{part}" in files:
                raise RacError(
                    f"{module}: has a {part}, so its zeros are not stored as zeros and cannot be "
                    "left out; quantize with a symmetric scheme (symmetric: true, such as W4A16 "
                    "instead of W4A16_ASYM), or set storage: dense"
                )
        name, bits = f"{module}.weight", None
        if name in files:
            weight = files.tensor(name)
        elif (stored := words_of(files, module, schemes)) is not None:
            weight, bits = stored
        else:
            raise RacError(
                f"{module}: quantized to a layout that cannot be stored sparse; quantize to int "
                "of 4 or 8 bits or to float8, or store it dense (storage: dense)"
            )
        weight = weight if convert is None else convert(weight)
        tensors = pack(weight, format, module, bits)  # first: it refuses other shapes
        structure = structures[module]
        if format != FORMAT_24 and (broken := count_broken_groups(weight, structure, module)):
            raise RacError(
                f"{module}: {broken} groups break {structure}; prune it again, or name it "
                "unstructured"
            )
        zeros, weights = zeros + count_zeros(weight), weights + weight.numel()
        return tensors

    replacements = {module: partial(packed, module) for module in structures}
    before, after = _rewrite(files, new, ("weight", WORDS, WORDS_SHAPE), replacements)
    summary = PackSummary(format, structures, zeros / weights, before, after)
    packed_config = with_packed(config, format, structures, summary.global_sparsity, ignore)
    new.write_json(CONFIG_FILE, packed_config)
    return summary


def _rewrite(
    files: TensorFiles,
    new: NewFiles,
    replaced_parts: Iterable[str],
    replacements: Mapping[str, Callable[[], dict[str, Tensor]]],
) -> tuple[int, int]:
    """Write each file that holds a replaced tensor anew, and the index; return bytes before, after.

    A function of `replacements` returns the tensors, by part, that replace the
    `replaced_parts` of its module, in the file of the first of them.
    """
    replaced: set[str] = set()
    first: dict[str, str] = {}
    for module in replacements:
        names = [name for part in replaced_parts if (name := f"{module}.{part}") in files]
        if not names:
            raise RacError(
                f"{module}.weight: not in {files.folder}; name modules as the saved files do"
            )
        replaced.update(names)
        first[names[0]] = module
    where: dict[str, str] = {}
    after = 0
    for file in sorted(set(files.where.values())):
        names = sorted(name for name, holder in files.where.items() if holder == file)
        unchanged = [name for name in names if name not in replaced]
        where |= dict.fromkeys(unchanged, file)
        if len(unchanged) == len(names):
            continue
        tensors = {name: files.tensor(name) for name in unchanged}
        for module in (first[name] for name in names if name in first):
            for part, tensor in replacements[module]().items():
                tensors[f"{module}.{part}"] = tensor
                after += tensor.nbytes
        where |= dict.fromkeys(tensors, file)
        new.write_tensors(file, tensors, files.metadata(file))
    before = sum(map(files.nbytes, replaced))
    if files.index is not None:
        new.write_json(INDEX_FILE, files.new_index(where, after - before))
    return before, after


def _others(folder: Path) -> list[Path]:
    """List the files next to the weights: tokenizer, generation settings, licence, ..."""
    excluded = (*_WEIGHTS, ".index.json")
    files = (path for path in sorted(folder.iterdir()) if path.is_file() and path.name[0] != ".")
    return [p for p in files if p.name != CONFIG_FILE and not p.name.endswith(excluded)]


def _check_links(folder: Path) -> None:
    """Refuse links to files outside of the model (RacError); the hub's cache is made of links."""
    home = folder.resolve()
    homes = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    for path in [*_others(folder), folder / CONFIG_FILE, folder / INDEX_FILE]:
        target = path.resolve()
        if path.is_symlink() and not any(target.is_relative_to(place) for place in homes):
            raise RacError(
                f"{path}: is a link to {target}, outside of the model; copy that file to {folder}, "
                "or remove the link"
            )


def _record(folder: Path) -> dict[str, Any]:
    path = folder / RUN_RECORD_NAME
    return read_json(path) if path.is_file() else {}
