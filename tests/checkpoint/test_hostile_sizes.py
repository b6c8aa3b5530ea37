"""A hostile file takes no more memory than three times its size; codes of four bits, four times.

Without the limits that these files try, each takes ten times its size and more.
"""

import json
import resource
import shutil
import struct
import sys
from pathlib import Path
from typing import Any

import pytest

from rac_modifier.checkpoint.hf_quantizer import load_model
from rac_modifier.checkpoint.inspect import inspect_checkpoint
from rac_modifier.checkpoint.packing import unpack_model
from rac_modifier.errors import RacError
from tests.forked import run

SIZE = 32_000_000
LATE = 64_000_000  # modules that a reader imports, and freed memory that malloc keeps
MODULE = "model.layers.0.mlp.up_proj"
WIDTH = 1 << 13  # bytes of a row


def unpacked(folder: str) -> None:
    unpack_model(folder, f"{folder}.out")


READERS = {"inspect": inspect_checkpoint, "unpack": unpacked, "load": load_model}


def main() -> None:
    """READER FOLDER: print by how many bytes the peak of this process rose."""
    reader, folder = sys.argv[1:]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        READERS[reader](folder)
    except RacError as error:
        print(error, file=sys.stderr)
    print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))


def header_of_names(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    return {f"m.{number}.weight": ("F32", [0], 0) for number in range(SIZE // 64)}


def nested_lists(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    config["x"] = [[]] * (SIZE // 4)
    return {"a.weight": ("F32", [1], 4)}


def names_in_an_index(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    where = {f"m.{number}.weight": "a.safetensors" for number in range(SIZE // 40)}
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return {}


def codes_in_words(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Zeros in int4, as `rac pack` has them before it packs."""
    rows = SIZE // WIDTH
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "channel"}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "pack-quantized",
        "config_groups": {"g": {"targets": ["Linear"], "weights": weights}},
    }  # fmt: skip
    return {
        f"{MODULE}.weight_packed": ("I32", [rows, WIDTH // 4], rows * WIDTH),
        f"{MODULE}.weight_scale": ("F32", [rows, 1], 4 * rows),
        f"{MODULE}.weight_shape": ("I64", [2], struct.pack("<qq", rows, 2 * WIDTH)),
    }


def mask_of_nothing(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """A mask, and row starts of another one."""
    rows = SIZE // WIDTH
    sparsity = {"format": "sparse-bitmask"}
    config["quantization_config"] = {"quant_method": "rac", "sparsity_config": sparsity}
    return {
        f"{MODULE}.bitmask": ("U8", [rows, WIDTH], rows * WIDTH),
        f"{MODULE}.compressed": ("F32", [0], 0),
        f"{MODULE}.row_offsets": ("I64", [rows], struct.pack("<q", 1) * rows),
        f"{MODULE}.shape": ("I64", [2], struct.pack("<qq", rows, 8 * WIDTH)),
    }


@pytest.mark.parametrize(
    ("make", "most"),
    [
        (header_of_names, 3),
        (nested_lists, 3),
        (names_in_an_index, 3),
        (mask_of_nothing, 3),
        (codes_in_words, 4),  # words, and int8 of twice their size
    ],
)
def test_memory_is_bounded_by_the_file(tiny_folder, tmp_path, make, most):
    folder = tmp_path / "model"
    folder.mkdir()
    config = json.loads((tiny_folder / "config.json").read_text())
    header, data, at = {}, b"", 0
    for name, (dtype, shape, content) in make(folder, config).items():
        content = bytes(content) if isinstance(content, int) else content
        data, start, at = data + content, at, at + len(content)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, at]}
    (folder / "config.json").write_text(json.dumps(config))
    if header:
        text = json.dumps(header).encode()
        path = folder / "model.safetensors"
        path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert SIZE * 0.7 < size < SIZE * 1.5
    for reader in READERS:
        end = run(main, [reader, str(folder)], tmp_path)
        assert end.returncode == 0, end.stderr
        assert int(end.stdout.splitlines()[-1]) < most * size + LATE, (reader, end.stderr)
        for path in tmp_path.parent.glob(f"{tmp_path.name}.*"):
            path.unlink()
        shutil.rmtree(f"{folder}.out", ignore_errors=True)
