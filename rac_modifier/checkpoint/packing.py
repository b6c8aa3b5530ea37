"""Checkpoints packed, in place or into a new folder, and unpacked for stock loaders.

The disk needs room for both copies of the changed files. Memory is needed for the new tensors
of one file and for one tensor that is read. The source of a new folder is only read.
"""

import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from rac_modifier.checkpoint import pack_plan
from rac_modifier.checkpoint.card import CARD_NAME, RUN_RECORD_NAME, converted_card, environment
from rac_modifier.checkpoint.files import CONFIG_FILE, INDEX_FILE, TensorFiles, write_tensors_atomic
from rac_modifier.checkpoint.formats import (
    FORMAT_24,
    FORMAT_BITMASK,
    FORMATS,
    PackedFiles,
    SparseBitmask,
    structure_of,
)
from rac_modifier.checkpoint.output_folder import check_output_folder, check_room, new_files
from rac_modifier.checkpoint.pack_plan import PackPlan
from rac_modifier.errors import RacError
from rac_modifier.formats.quantization_config import (
    QUANTIZATION_KEY,
    SparsityRecord,
    int8_in_words,
    weight_schemes,
    with_dense_mark,
    with_int8_activations,
    with_packed,
)
from rac_modifier.formats.stored_weight import PER_BLOCK, count_broken_groups
from rac_modifier.formats.words import PACKED_BITS, WORDS, WORDS_SHAPE, PackQuantized
from rac_modifier.runtime.files import (
    read_json,
    without_paths,
    write_json_atomic,
    write_text_atomic,
)

# Weights in other files than those that are packed: they would stay dense, or twice in the folder.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
_TEMPLATES = "additional_chat_templates"  # transformers' folder for a second chat template
_MODULES = "[0-9]_*/*"  # files of sentence-transformers, such as 1_Pooling/config.json
_SMALL_FILES = 1 << 20  # bytes


@dataclass(frozen=True)
class PackSummary:
    """What was packed or unpacked: structure by module, and bytes of weights without scales."""

    format: str
    modules: dict[str, str]
    dense_bytes: int
    packed_bytes: int


def pack_checkpoint(
    folder: str | Path, modules: dict[str, str], dense_linears: Iterable[str] = ()
) -> PackSummary:
    """Pack `modules` (by name on disk: "2:4", "N:M" or "unstructured") of a saved model in place.

    RacError, with the folder as before: a module that cannot be packed, a folder that is packed or
    in use, a full disk. `dense_linears`: the linear modules that stay dense.
    """
    structures = {name: structure_of(value, name) for name, value in sorted(modules.items())}
    with TensorFiles(folder) as files, new_files(Path(folder)) as new:
        all_24 = all(structure == "2:4" for structure in structures.values())
        format = FORMATS[FORMAT_24 if all_24 else FORMAT_BITMASK]
        return _write_packed(files, structures, dense_linears, format, new)


def mark_dense(folder: str | Path, modules: dict[str, str]) -> None:
    """Record in config.json of a model that is not packed that `modules` are pruned (RacError)."""
    config = read_json(Path(folder) / CONFIG_FILE)
    structures = {name: structure_of(value, name) for name, value in sorted(modules.items())}
    with TensorFiles(folder) as files:
        pack_plan.check_unpacked(files, config)
    write_json_atomic(Path(folder) / CONFIG_FILE, with_dense_mark(config, structures))


def pack_model(plan: PackPlan, out: str | Path, base_model: str) -> PackSummary:
    """Write a packed checkpoint as planned into `out`, a new or empty folder (RacError)."""
    plan.check_gain()
    source, kept = plan.folder, plan.keep_negative_zeros
    need = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    with _new_folder(source, Path(out), need) as (files, new):
        convert = None if kept else pack_plan.without_negative_zeros
        format = FORMATS[plan.format or FORMAT_BITMASK]
        summary = _write_packed(files, plan.structures, plan.ignore, format, new, convert)
        figures = {
            **asdict(summary),
            "modules": dict(sorted(Counter(summary.modules.values()).items())),
            "negative_zeros": "kept" if kept else "dropped",
        }
        run = {"base_model": base_model, "packing": figures, "versions": environment()}
        _keep_int8_activations(source, new)
        _write_record(source, new, _record(source) or run, packed=True)
    return summary


def unpack_model(source: str | Path, out: str | Path) -> PackSummary:
    """Write a packed checkpoint dense, in upstream's layout, for stock loaders (RacError)."""
    source = Path(source)
    config = read_json(source / CONFIG_FILE)
    recorded = SparsityRecord.of(config).modules
    with _new_folder(source, Path(out), 0) as (files, new):
        packed = PackedFiles(files, config)
        if packed.format is None:
            raise RacError(f"{source}: is not packed; stock loaders read it as it is")
        before, after = _rewrite(files, new, packed.format.parts, packed.modules, packed.dense)
        write_json_atomic(new / CONFIG_FILE, with_dense_mark(config, recorded))
        _keep_int8_activations(source, new)
        if record := _record(source):
            _write_record(source, new, record, packed=False)
    structures = {**dict.fromkeys(packed.modules, packed.format.structure), **recorded}
    return PackSummary(packed.format.name, structures, after, before)


@contextmanager
def _new_folder(source: Path, out: Path, need: int) -> Iterator[tuple[TensorFiles, Path]]:
    """Copy what the body does not write: the other files of the source."""
    _check_links(source)
    with TensorFiles(source) as files:
        check_output_folder(out, source)
        check_room(out, need + _SMALL_FILES)
        with new_files(out) as new:
            yield files, new
            weights = [*files.where.values(), *([INDEX_FILE] if files.index else [])]
            for path in {*(source / name for name in weights), *_others(source)}:
                copy = new / path.relative_to(source)
                if not copy.exists():
                    copy.parent.mkdir(exist_ok=True)
                    shutil.copyfile(path, copy)


def _write_packed(
    files: TensorFiles,
    structures: dict[str, str],
    ignore: Iterable[str],
    format: SparseBitmask,
    new: Path,
    convert: Callable[[Tensor], Tensor] | None = None,
) -> PackSummary:
    """Write the files that packing changes; `convert` is applied to each weight before it."""
    config = read_json(files.folder / CONFIG_FILE)
    pack_plan.check_unpacked(files, config)
    schemes = weight_schemes(config.get(QUANTIZATION_KEY))
    int8_in_words(schemes)  # refuses both layouts of int8 in one checkpoint

    def packed(module: str) -> dict[str, Tensor]:
        if part := pack_plan.asymmetric_part(files, module):
            raise RacError(
                f"{module}: has a {part}, so its zeros cannot be left out; quantize with a "
                "symmetric scheme (W4A16 instead of W4A16_ASYM), or set storage: dense"
            )
        if pack_plan.in_blocks(files, module):
            raise RacError(
                f"{module}: {PER_BLOCK}; quantize with a scale per row (FP8_DYNAMIC instead of "
                "FP8_BLOCK), or set storage: dense"
            )
        name, bits = f"{module}.weight", None
        if name in files:
            weight = files.tensor(name)
        else:
            words = files.tensors(module, PackQuantized.dtypes)
            stored = PackQuantized.read(words, module, schemes)
            if stored is None or stored.bits not in PACKED_BITS:
                raise RacError(
                    f"{module}: quantized to a layout that cannot be stored sparse; quantize to "
                    "int of 4 or 8 bits or to float8, or store it dense (storage: dense)"
                )
            weight, bits = stored.dense(), stored.bits
        weight = weight if convert is None else convert(weight)
        tensors = format.compress(weight, module, bits)  # first: it refuses other shapes
        structure = structures[module]
        if format.name != FORMAT_24 and (broken := count_broken_groups(weight, structure, module)):
            raise RacError(
                f"{module}: {broken} groups break {structure}; prune again, or name it unstructured"
            )
        return tensors

    before, after = _rewrite(files, new, ("weight", WORDS, WORDS_SHAPE), structures, packed)
    packed_config = with_packed(config, format.name, structures, ignore)
    write_json_atomic(new / CONFIG_FILE, packed_config)
    return PackSummary(format.name, structures, before, after)


def _rewrite(
    files: TensorFiles,
    new: Path,
    replaced_parts: Iterable[str],
    modules: Iterable[str],
    replacement: Callable[[str], dict[str, Tensor]],
) -> tuple[int, int]:
    """Write the files that hold replaced tensors, and the index; return bytes before, after."""
    replaced: set[str] = set()
    first: dict[str, str] = {}
    for module in modules:
        names = [name for part in replaced_parts if (name := f"{module}.{part}") in files]
        if not names:
            raise RacError(f"{module}.weight: not in {files.folder}; name modules as the files do")
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
            for part, tensor in replacement(module).items():
                tensors[f"{module}.{part}"] = tensor
                after += tensor.nbytes
        where |= dict.fromkeys(tensors, file)
        write_tensors_atomic(new / file, tensors, {"format": "pt"})
    before = sum(map(files.nbytes, replaced))
    if files.index is not None:
        size = {"total_size": sum(map(files.nbytes, files.where)) + after - before}
        index = {"metadata": size, "weight_map": dict(sorted(where.items()))}
        write_json_atomic(new / INDEX_FILE, index)
    return before, after


def _others(folder: Path) -> list[Path]:
    """List the files next to the weights: tokenizer, generation settings, pooling, licence, ..."""
    excluded = (*_WEIGHTS, ".index.json")
    paths = [*sorted(folder.iterdir()), *sorted(folder.glob(f"{_TEMPLATES}/*"))]
    files = (path for path in paths if path.is_file() and path.name[0] != ".")
    kept = [p for p in files if p.name != CONFIG_FILE and not p.name.endswith(excluded)]
    return kept + sorted(path for path in folder.glob(_MODULES) if path.is_file())


def _check_links(folder: Path) -> None:
    """Refuse links to files outside of the model (RacError); the hub's cache is made of links."""
    home = folder.resolve()
    homes = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    for path in [*_others(folder), folder / CONFIG_FILE, folder / INDEX_FILE]:
        target = path.resolve()
        if not any(target.is_relative_to(place) for place in homes):
            raise RacError(
                f"{path}: links to {target}, outside the model; copy that file, or remove the link"
            )


def _keep_int8_activations(source: Path, new: Path) -> None:
    """Record the modules with 8-bit activations: their weights are the same, unlike in a run."""
    if modules := SparsityRecord.of(read_json(source / CONFIG_FILE)).int8_activations:
        config = with_int8_activations(read_json(new / CONFIG_FILE), modules)
        write_json_atomic(new / CONFIG_FILE, config)


def _record(folder: Path) -> dict[str, Any]:
    path = folder / RUN_RECORD_NAME
    return read_json(path) if path.is_file() else {}


def _write_record(source: Path, new: Path, record: Mapping[str, Any], packed: bool) -> None:
    """Write the run record and the card of a model that was packed or unpacked."""
    record = without_paths(record)
    card = converted_card(record, source, packed)
    write_json_atomic(new / RUN_RECORD_NAME, record)
    write_text_atomic(new / CARD_NAME, card)
