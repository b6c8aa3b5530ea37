"""The packed formats of a weight by name, and the packed modules of a checkpoint's files.

A new format is a class with the members of `PackedFormat` and an entry of `PACKED`. transformers,
vLLM and `rac inspect` read every packed module through `check`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from rac_modifier.checkpoint.bitmask_formats import Bitmask, Bitmask24
from rac_modifier.checkpoint.files import TensorFiles
from rac_modifier.checkpoint.quantization_config import WORDS, WeightScheme, stores_words
from rac_modifier.checkpoint.stored_weight import (
    FLOATS,
    SCALE,
    UNSTRUCTURED,
    StoredWeight,
    check_scale,
    check_scale_values,
)
from rac_modifier.errors import RacError
from rac_modifier.settings.pattern import Pattern

FORMAT_24 = Bitmask24.name
FORMAT_BITMASK = Bitmask.name
# A tensor with such a name shows that its module is packed, even where the other parts are missing.
_MARKERS = ("compressed", "bitmask", "row_offsets")


class PackedFormat(Protocol):
    """A sparse format: the tensors `<module>.<part>` that replace `<module>.weight`."""

    @property
    def name(self) -> str:
        """Return the name in config.json."""

    @property
    def parts(self) -> tuple[str, ...]:
        """Return the names of the tensors."""

    def pack(self, weight: Tensor, module: str, bits: int | None = None) -> dict[str, Tensor]:
        """Return the tensors of a dense weight [N, K] by part.

        `bits` 4: the weight is int8, its values have four bits, and are stored in int32 words.

        Raises:
            RacError: the weight does not fit the format.
        """

    def size(self, rows: int, columns: int, stored: int, bits: int) -> int:
        """Return the bytes of all parts of a weight with `stored` values of `bits` bits."""

    def check(
        self, tensors: Mapping[str, Tensor], module: str, scaled: bool = True
    ) -> StoredWeight:
        """Check the tensors of a module as untrusted input and return its weight.

        Args:
            tensors: by part, and `weight_scale` where the values are quantized.
            module: its name, for messages.
            scaled: False where another reader checks the scales; the result then has none.

        Raises:
            RacError: naming `{module}.{part}`, where parts are missing, malformed or contradict
                each other.
        """


_FORMATS: tuple[PackedFormat, ...] = (Bitmask24(), Bitmask())
PACKED = {form.name: form for form in _FORMATS}
PARTS = {name: form.parts for name, form in PACKED.items()}


def pack(weight: Tensor, format: str, module: str, bits: int | None = None) -> dict[str, Tensor]:
    """Return the tensors of a dense weight [N, K] in a format (`PackedFormat.pack`)."""
    return PACKED[format].pack(weight, module, bits)


def check(
    tensors: Mapping[str, Tensor], format: str, module: str, scaled: bool = True
) -> StoredWeight:
    """Check the tensors of a module in the packed format of this name (`PackedFormat.check`)."""
    return PACKED[format].check(tensors, module, scaled)


def choose_format(structures: Iterable[str]) -> str:
    """Choose one format for a whole checkpoint: 2:4 only where every module is 2:4."""
    return FORMAT_24 if all(structure == "2:4" for structure in structures) else FORMAT_BITMASK


def structure_of(value: str, module: str) -> str:
    """Return a mask structure as it is recorded: "N:M" (N pruned), or "unstructured".

    Raises:
        RacError: `value` is neither of them (nor "0:0", which means unstructured).
    """
    if value in (UNSTRUCTURED, "0:0"):
        return UNSTRUCTURED
    try:
        return Pattern.parse(value, None).mask_structure
    except RacError as error:
        raise RacError(f"{module}: {error}") from error


def packed_modules(tensor_names: Iterable[str]) -> list[str]:
    """List the modules that are packed according to these tensor names, sorted."""
    split = (name.rpartition(".") for name in tensor_names)
    return sorted({module for module, _, part in split if module and part in _MARKERS})


def check_packed(
    files: TensorFiles, format: str | None, schemes: tuple[WeightScheme, ...] = ()
) -> list[str]:
    """Check names and dtypes of packed tensors; list the modules whose dense form is int32 words.

    `format` and `schemes` come from config.json; `format` is None for dense weights.

    Raises:
        RacError: config.json and the tensors contradict each other, or a packed module lacks a
            part.
    """
    modules = packed_modules(files.where)
    if format is None:
        if modules:
            raise RacError(
                f"{files.folder}: {modules[0]} is packed but config.json has no sparsity_config; "
                "restore the config.json that packing wrote"
            )
        return []
    if not modules:
        raise RacError(
            f"{files.folder}: config.json says {format}, but no tensor is packed; "
            "copy the whole model again"
        )
    parts = {f"{module}.{part}" for module in modules for part in PARTS[format]}
    if lost := sorted(parts - files.where.keys()):
        raise RacError(f"{lost[0]}: missing from {files.folder}; copy or save the checkpoint again")
    for module in modules:
        for part in ("weight", WORDS):
            if f"{module}.{part}" in files:
                raise RacError(
                    f"{module}.{part}: stored both dense and packed in {files.folder}; "
                    "save the model again"
                )
    in_words = (torch.int32, torch.int8) if stores_words(8, schemes) else (torch.int32,)
    return [module for module in modules if files.dtype(f"{module}.compressed") in in_words]


def packed_weight(
    files: TensorFiles, format: str, module: str, schemes: tuple[WeightScheme, ...] = ()
) -> StoredWeight:
    """Read and check the weight of a packed module, and its scales where its values are quantized.

    Raises:
        RacError: as `PackedFormat.check`, and for a tensor that cannot be read.
    """
    parts = [part for part in PARTS[format] if f"{module}.{part}" in files]
    tensors = {part: files.tensor(f"{module}.{part}") for part in parts}
    weight = check(tensors, format, module, scaled=False)
    _check_scales(files, module, weight.values.dtype, weight.rows, weight.columns, schemes)
    return weight


def check_packed_scales(
    files: TensorFiles, modules: list[str], schemes: tuple[WeightScheme, ...]
) -> None:
    """Check the scales of packed modules before their weights are read.

    Raises:
        RacError: naming the scale that is missing, damaged, or of another shape than its weight.
    """
    for module in modules:
        dtype, shape = files.dtype(f"{module}.compressed"), files.tensor(f"{module}.shape")
        if shape.dtype == torch.int64 and shape.numel() == 2:  # else the weight names the damage
            rows, columns = shape.flatten().tolist()
            _check_scales(files, module, dtype, rows, columns, schemes)


def _check_scales(
    files: TensorFiles,
    module: str,
    dtype: torch.dtype,
    rows: int,
    columns: int,
    schemes: tuple[WeightScheme, ...],
) -> None:
    name = f"{module}.{SCALE}"
    tensors = {SCALE: files.tensor(name)} if name in files else {}
    # scales of blocks of rows and columns have another shape, which vLLM and transformers check
    if dtype not in FLOATS and tensors and any(s.strategy == "block" for s in schemes):
        check_scale_values(tensors[SCALE], name)
    else:
        check_scale(tensors, dtype, rows, columns, module)
