"""The thresholds of activation sparsity, next to the weights that they were calibrated on.

While a model writes, input j of a linear layer counts as zero where |x_j| < thresholds[j], both in
float32; prompts run dense. The file is in a folder of its own, so that no other reader takes it for
a part of the model.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rac_modifier.checkpoint.files import TensorFiles, write_tensors_atomic
from rac_modifier.errors import RacError, refusing
from rac_modifier.formats.words import WORDS_SHAPE
from rac_modifier.runtime.files import regular_file

THRESHOLDS_FILE = "activation_sparsity/thresholds.safetensors"
_SUFFIX = ".input_thresholds"


@dataclass(frozen=True)
class InputThresholds:
    """Where the inputs of linear layers count as zero, a group of layers per x that they read."""

    thresholds: Mapping[str, Tensor]  # float32 [in_features] by the first module of the group
    groups: Mapping[str, tuple[str, ...]]  # all modules of the group by the first
    share: float  # of the modules' weight bytes, skipped per token on the calibration tokens
    predicted_kl: float  # that skipping adds per token, in nats

    def by_module(self) -> dict[str, Tensor]:
        """Return the thresholds of every module; those of a group are one tensor."""
        return {m: self.thresholds[first] for first, group in self.groups.items() for m in group}


def write_thresholds(folder: Path, given: InputThresholds) -> None:
    """Write thresholds into the folder of a checkpoint, tied to its weights (RacError, OSError)."""
    with TensorFiles(folder) as files:
        _check(given, files)
        about = {
            "share": repr(given.share),
            "predicted_kl": repr(given.predicted_kl),
            "groups": json.dumps(list(given.groups.values())),
            "weights": _digest(files, given.by_module()),
        }
    path = folder / THRESHOLDS_FILE
    path.parent.mkdir(exist_ok=True)
    tensors = {f"{first}{_SUFFIX}": values for first, values in given.thresholds.items()}
    write_tensors_atomic(path, tensors, about)


def read_thresholds(folder: str | Path) -> InputThresholds | None:
    """Read the thresholds of a checkpoint folder; None where it has none.

    RacError: not readable, not of this model's modules, negative, not finite, or of other weights.
    """
    path = Path(folder) / THRESHOLDS_FILE
    if not path.exists():
        return None
    regular_file(path, "thresholds")
    problem = f"{path}: cannot be read as thresholds of activation sparsity"
    step = "copy the model again, or remove the file to run dense"
    errors = (SafetensorError, OSError, LookupError, ValueError, TypeError, RecursionError)
    with refusing(problem, step, *errors):
        with safe_open(path, framework="pt", backend="pread") as file:
            names: list[str] = file.keys()
            tensors = {name.removesuffix(_SUFFIX): file.get_tensor(name) for name in names}
            about = file.metadata() or {}
        groups = {group[0]: tuple(group) for group in json.loads(about["groups"])}
        share, predicted = float(about["share"]), float(about["predicted_kl"])
        read = InputThresholds(tensors, groups, share, predicted)
        with TensorFiles(folder) as files:
            _check(read, files)
            if about["weights"] != _digest(files, read.by_module()):
                raise RacError("they were calibrated on other weights than those in this folder")
    return read


def _check(given: InputThresholds, files: TensorFiles) -> None:
    """Refuse thresholds that do not fit the modules in the files (RacError)."""
    modules = [module for group in given.groups.values() for module in group]
    if given.thresholds.keys() != given.groups.keys() or len(set(modules)) != len(modules):
        raise RacError(f"its tensors {sorted(given.thresholds)[:3]} are not those of its groups")
    if not (0 <= given.share < 1 and 0 <= given.predicted_kl < math.inf):
        raise RacError(f"share {given.share} or predicted KL {given.predicted_kl} is out of range")
    for first, group in given.groups.items():
        values = given.thresholds[first]
        for module in group:
            inputs = _inputs(files, module)
            if values.dtype != torch.float32 or list(values.shape) != [inputs]:
                raise RacError(
                    f"{first}: {values.dtype} {list(values.shape)} instead of torch.float32 "
                    f"[{inputs}], the inputs of {module}"
                )
        if not bool((values >= 0).all() and values.isfinite().all()):  # NaN is not >= 0
            raise RacError(f"{first}: a threshold is negative or not finite")


def _inputs(files: TensorFiles, module: Any) -> int:
    """Return the inputs of a module in the files (RacError: it has no matrix there)."""
    if f"{module}.weight" in files and len(files.shape(f"{module}.weight")) == 2:
        return files.shape(f"{module}.weight")[1]
    for part in (WORDS_SHAPE, "shape"):  # of packed words, and of a bitmask
        if f"{module}.{part}" in files:
            return int(files.tensor(f"{module}.{part}").flatten()[-1])
    raise RacError(f"{module!r}: no linear layer of this model")


def _digest(files: TensorFiles, modules: Iterable[str]) -> str:
    """Return a hash of the modules' tensors: names, dtypes, shapes and the values of a first row.

    All values would take as long to read as the model; other weights differ in a first row.
    """
    known, digest = set(modules), hashlib.sha256()
    for name in sorted(files.where):
        if name.rpartition(".")[0] in known:
            digest.update(f"{name} {files.dtype_name(name)} {files.shape(name)}".encode())
            digest.update(files.first_row(name).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
