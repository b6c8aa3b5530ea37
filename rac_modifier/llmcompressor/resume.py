"""The modules that a run has pruned so far, in a folder next to its output: a run that was killed goes on from there.

Activations are not kept. A run that goes on restores the pruned weights and repeats the forward passes, so it calibrates on the
same activations and ends with the same weights. The model, the recipe, the calibration set, versions and the number of threads
are compared; statistics are not kept, so there is nothing else to compare.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.offload import disable_onloading
from compressed_tensors.utils import align_module_device, update_offload_parameter
from loguru import logger
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from rac_modifier.checkpoint.output_folder import check_room
from rac_modifier.errors import RacError
from rac_modifier.files import read_json, remove_folder, write_json_atomic

_SAVE_SECONDS = 30.0  # groups that are pruned within this time share a file; a kill loses no more
_ABOUT = "about.json"
_CALIBRATION = "calibration set"
_STORES = "trace stores"  # may have grown; named where the calibration set differs
_MADE_WITH = "made with"
_PARAMETERS = ("weight", "weight_scale", "weight_zero_point")
_MASTER = "master"  # the weight before it was rounded


def made_with(device: torch.device) -> dict[str, Any]:
    """Return the versions, and on a CPU the number of threads, that the bits of a run depend on."""
    packages = ("rac-modifier", "torch", "transformers", "llmcompressor", "compressed-tensors")
    threads = {"threads (OMP_NUM_THREADS)": torch.get_num_threads()} if device.type == "cpu" else {}
    return {_MADE_WITH: {**{name: version(name) for name in packages}, **threads}}


def check_disk(
    output: Path, model: torch.nn.Module, modules: Iterable[torch.nn.Module], *, masters: bool
) -> None:
    """Refuse a run whose disk has too little room, before anything is sampled.

    Counted are the weights, dense and packed, those of the pruned `modules`, which are kept until the end, and with `masters`
    their float32 weights before rounding.

    Raises:
        RacError: with the bytes that are free and needed.
    """
    with disable_onloading():
        whole = sum(p.numel() * p.element_size() for p in model.parameters())
        weights = [module.get_parameter("weight") for module in modules]
        groups = sum(w.numel() * (w.element_size() + (4 if masters else 0)) for w in weights)
    check_room(output, 2 * whole, groups)


class Resume:
    """A run without an output folder: nothing is kept, and nothing is resumed."""

    def begin(self, about: Mapping[str, Any]) -> None:
        """Do nothing, as all methods of this class."""

    def has(self, names: Sequence[str]) -> bool:
        """Return False."""
        return False

    def restore(
        self, name: str, module: torch.nn.Module, masters: dict[str, torch.Tensor]
    ) -> dict[str, Any]:
        """Refuse a module that was not kept."""
        raise KeyError(name)

    def add(
        self,
        modules: Mapping[str, torch.nn.Module],
        records: Mapping[str, dict[str, Any]],
        masters: Mapping[str, torch.Tensor],
    ) -> None:
        """Do nothing."""

    def remove(self) -> None:
        """Do nothing."""


class FinishedGroups(Resume):
    """The modules that are pruned, with their records.

    Attributes:
        folder: files of groups, each written whole or not at all, and `about.json`, which says what run they are of.

    Raises:
        RacError: the folder holds another run (another recipe, model or version), cannot be read, or cannot be written to.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any]):
        self.folder = folder
        self._about = dict(about)
        self._begun = False
        self._places: dict[str, Path] = {}
        self._pending: dict[str, tuple[torch.nn.Module, dict[str, Any], torch.Tensor | None]] = {}
        self._written = time.monotonic()
        self._check(self._about)
        place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not (place.is_dir() and os.access(place, os.W_OK)):
            raise self._unwritable(f"{place} is not a folder that can be written to")

    def begin(self, about: Mapping[str, Any]) -> None:
        """Write and restore groups from here on; `about` is what was not known before, such as the calibration set.

        Raises:
            RacError: as for the class.
        """
        self._check(about)
        self._about |= about
        self._begun = True
        files = sorted(self.folder.glob("group-*.safetensors"))
        self._places = {name: file for file in files for name in self._names(file)}
        if self._places:
            logger.info(
                f"{len(self._places)} modules were pruned before the last run was stopped ({self.folder})"
            )

    def has(self, names: Sequence[str]) -> bool:
        """Return whether all of these modules were pruned."""
        return self._begun and bool(names) and all(name in self._places for name in names)

    def restore(
        self, name: str, module: torch.nn.Module, masters: dict[str, torch.Tensor]
    ) -> dict[str, Any]:
        """Restore the weights of a module, and into `masters` its weight before it was rounded; returns its record.

        Raises:
            RacError: the file is damaged, or holds another shape than the module.
        """
        path = self._places[name]
        try:
            with safe_open(path, framework="pt") as file:
                record: dict[str, Any] = json.loads(file.metadata()[name])
                tensors = {
                    part: file.get_tensor(f"{name}.{part}")
                    for part in (*_PARAMETERS, _MASTER)
                    if f"{name}.{part}" in file.keys()  # noqa: SIM118 - no mapping
                }
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise self._damaged(path, error) from error
        if _MASTER in tensors:
            masters[name] = tensors.pop(_MASTER)
        for part, tensor in tensors.items():
            parameter = getattr(module, part, None)
            if parameter is None or parameter.shape != tensor.shape:
                raise self._damaged(path, f"{name}.{part} has the shape {tuple(tensor.shape)}")
            update_offload_parameter(module, part, tensor)
        return record

    def add(
        self,
        modules: Mapping[str, torch.nn.Module],
        records: Mapping[str, dict[str, Any]],
        masters: Mapping[str, torch.Tensor],
    ) -> None:
        """Keep groups that were solved in one call: written now, or with those after them.

        All of them are in one file: solved again without the others, they would have other bits.

        Raises:
            RacError: the disk is full, or the folder cannot be written to. What was written before stays.
        """
        if not self._begun:
            return
        self._pending |= {
            name: (module, records[name], masters.get(name)) for name, module in modules.items()
        }
        if time.monotonic() - self._written >= _SAVE_SECONDS:
            self._write()
            self._written = time.monotonic()

    def remove(self) -> None:
        """Remove the folder, when the result of the run is saved."""
        remove_folder(self.folder)

    def _write(self) -> None:
        tensors, records = {}, {}
        for name, (module, record, master) in self._pending.items():
            with align_module_device(module):
                for part in _PARAMETERS:
                    if hasattr(module, part):
                        tensor = getattr(module, part).detach().to("cpu", copy=True)
                        tensors[f"{name}.{part}"] = tensor.contiguous()
            if master is not None:
                tensors[f"{name}.{_MASTER}"] = master.contiguous()
            records[name] = json.dumps(record)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not (self.folder / _ABOUT).exists():
                write_json_atomic(self.folder / _ABOUT, self._about)
            path = self.folder / f"group-{self._next_number():05}.safetensors"
            new = path.with_suffix(".new")
            try:
                save_file(tensors, new, metadata=records)
                with new.open("rb") as file:
                    os.fsync(file.fileno())
                os.replace(new, path)
            except BaseException:
                new.unlink(missing_ok=True)
                raise
        except (OSError, SafetensorError, RacError) as error:
            raise self._unwritable(error) from error
        self._pending.clear()

    def _next_number(self) -> int:
        """Return the last file's number + 1, so that no file is overwritten where others are missing."""
        files = self.folder.glob("group-*.safetensors")
        return max((int(file.stem.removeprefix("group-")) for file in files), default=-1) + 1

    def _names(self, path: Path) -> list[str]:
        try:
            with safe_open(path, framework="pt") as file:
                return list(file.metadata() or ())
        except (OSError, SafetensorError) as error:
            raise self._damaged(path, error) from error

    def _check(self, about: Mapping[str, Any]) -> None:
        """Refuse a folder of another run."""
        if not (self.folder / _ABOUT).exists():
            return  # nothing was written, or not even this
        before = read_json(self.folder / _ABOUT)
        for key, value in about.items():
            old = before.get(key)
            if old == value or key == _STORES:
                continue
            if key == _MADE_WITH:
                raise RacError(
                    f"{self.folder} holds what a run has pruned that was begun with {_changes(old or {}, value)}, and would not "
                    "end with the same bits: use the same, or remove the folder to start again"
                )
            because = _difference(old, value)
            stores, now = before.get(_STORES) or {}, about.get(_STORES) or {}
            if key == _CALIBRATION and stores and now and stores != now:
                because = f", since a trace store is another one ({_changes(stores, now)})"
            raise RacError(
                f"{self.folder} holds what a run with another {key} has pruned{because}; "
                "start that run again to go on with it, or remove the folder to start anew"
            )

    def _unwritable(self, why: object) -> RacError:
        return RacError(
            f"{self.folder}: what is pruned so far cannot be kept there ({why}); make room or name another output_dir. The same "
            "run, started again, goes on from the groups that were written"
        )

    def _damaged(self, path: Path, error: object) -> RacError:
        return RacError(f"{path}: cannot be read ({error}); remove {self.folder} to start anew")


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Return all entries that differ, before and now."""
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return ", ".join(
        f"{name} {old.get(name, 'unknown')}, now {new.get(name, 'none')}" for name in names
    )


def _difference(old: Any, new: Any) -> str:
    """Return the first settings that differ, for a message; "" where that would not be readable."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return "" if old is None or len(str(old)) > 40 else f" ({old!r} there, {new!r} here)"
    before, now = _flat(old), _flat(new)
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    shown = [f"{key}: {before.get(key)!r} there, {now.get(key)!r} here" for key in changed[:3]]
    return f" ({'; '.join(shown)})"


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat
