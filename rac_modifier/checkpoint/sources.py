"""The dense view of a checkpoint: every tensor under its dense name, read and unpacked when asked for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rac_modifier.checkpoint.files import TensorFiles
from rac_modifier.checkpoint.formats import PARTS, packed_modules, unpack
from rac_modifier.checkpoint.int32_words import word_count
from rac_modifier.checkpoint.quantization_config import (
    WORDS,
    WORDS_SHAPE,
    WeightScheme,
    quantized_weight,
    stores_words,
    to_words,
    weight_schemes,
)
from rac_modifier.checkpoint.record import read_json
from rac_modifier.checkpoint.sparsity_config import CONFIG_FILE, packed_format
from rac_modifier.errors import RacError


class StoredTensor:
    """A tensor that is in the file as it is."""

    def __init__(self, files: TensorFiles, name: str) -> None:
        self._files, self._name = files, name

    def read(self) -> Tensor:
        """The tensor."""
        return self._files.tensor(self._name)

    @property
    def shape(self) -> tuple[int, ...]:
        """From the file's header, as the others here."""
        return self._files.shape(self._name)

    @property
    def dtype(self) -> torch.dtype:
        """Of the dense tensor."""
        return self._files.dtype(self._name)

    @property
    def dtype_name(self) -> str:
        """In safetensors' spelling, such as "BF16"."""
        return self._files.dtype_name(self._name)


class PackedWeight(StoredTensor):
    """A weight that is unpacked from its module's parts at each read."""

    def __init__(self, files: TensorFiles, module: str, format: str) -> None:
        super().__init__(files, f"{module}.compressed")
        self._module, self._format = module, format

    def read(self) -> Tensor:
        """The dense weight.

        Raises:
            RacError: naming the part that is damaged.
        """
        parts = PARTS[self._format]
        return unpack(
            {part: self._files.tensor(f"{self._module}.{part}") for part in parts}, self._format, self._module
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """As the module's `shape` tensor says."""
        return tuple(self._files.tensor(f"{self._module}.shape").flatten().tolist())


class PackedWords(PackedWeight):
    """A quantized weight that upstream stores in int32 words of `bits` bits a value, unpacked and packed anew."""

    def __init__(self, files: TensorFiles, module: str, format: str, bits: int) -> None:
        super().__init__(files, module, format)
        self._bits = bits

    def read(self) -> Tensor:
        """As upstream's `weight_packed`."""
        return to_words(super().read(), self._bits)[WORDS]

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows, and words of a row."""
        rows, columns = super().shape
        return rows, word_count(columns, self._bits)

    dtype = torch.int32
    dtype_name = "I32"


class WordsShape(StoredTensor):
    """Upstream's `weight_shape`: the module's `shape`, as two numbers."""

    def read(self) -> Tensor:
        """Int64 [2]."""
        return super().read().flatten()

    shape = (2,)


def dense_sources(
    files: TensorFiles, format: str | None, schemes: tuple[WeightScheme, ...] = ()
) -> dict[str, StoredTensor]:
    """Where each dense tensor comes from, by its dense name: `<module>.weight`, or upstream's `weight_packed` for words.

    Raises:
        RacError: config.json's `format` and the tensors contradict each other, or a packed module lacks a part.
    """
    modules = packed_modules(files.where)
    if format is None:
        if modules:
            raise RacError(
                f"{files.folder}: {modules[0]} is packed but config.json has no sparsity_config; restore the "
                "config.json that packing wrote"
            )
        return {name: StoredTensor(files, name) for name in files.where}
    if not modules:
        raise RacError(
            f"{files.folder}: config.json says {format}, but no tensor is packed; copy the whole model again"
        )
    parts = {f"{module}.{part}" for module in modules for part in PARTS[format]}
    if lost := sorted(parts - files.where.keys()):
        raise RacError(f"{lost[0]}: missing from {files.folder}; copy or save the checkpoint again")
    sources = {name: StoredTensor(files, name) for name in files.where if name not in parts}
    for module in modules:
        for part in ("weight", WORDS):
            if f"{module}.{part}" in sources:
                raise RacError(f"{module}.{part}: stored both dense and packed in {files.folder}; save the model again")
        stored = files.dtype(f"{module}.compressed")
        bits = {torch.int32: 4, torch.int8: 8}.get(stored)
        if bits is not None and (stored == torch.int32 or stores_words(bits, schemes)):
            sources[f"{module}.{WORDS}"] = PackedWords(files, module, format, bits)
            sources[f"{module}.{WORDS_SHAPE}"] = WordsShape(files, f"{module}.shape")
        else:
            sources[f"{module}.weight"] = PackedWeight(files, module, format)
    return sources


def words_weight(files: TensorFiles, module: str, config: dict[str, Any]) -> tuple[Tensor, int] | None:
    """Int8 [N, K] and bits of a value, for a module stored in int32 words; None for a layout that is not read here.

    Raises:
        RacError: a tensor that cannot be read.
    """
    names = [f"{module}.{part}" for part in (WORDS, WORDS_SHAPE)]
    if not all(name in files for name in names) or files.dtype(names[0]) != torch.int32:
        return None
    parts = {part: files.tensor(f"{module}.{part}") for part in (WORDS, WORDS_SHAPE)}
    try:
        return quantized_weight(parts, module, weight_schemes(config))
    except RacError:
        return None


def iter_dense_tensors(folder: str | Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a checkpoint by name, packed weights as `<module>.weight`, one at a time.

    Raises:
        RacError: a missing or damaged file or tensor.
    """
    with TensorFiles(folder) as files:
        config = read_json(Path(folder) / CONFIG_FILE)
        for name, source in dense_sources(files, packed_format(config), weight_schemes(config)).items():
            yield name, source.read()
