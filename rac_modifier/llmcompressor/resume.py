"""Keep what a run has pruned next to its output, for a run that is killed.

Activations are not kept. A run that goes on restores the pruned weights and repeats the
forward passes, so it ends with the same weights. The model, the recipe, the calibration
set, versions and the number of threads are compared.
"""

from __future__ import annotations

import json
import os
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

_ABOUT = "about.json"
_CALIBRATION = "calibration set"
_STORES = "trace stores"  # may have grown; named if the calibration set differs
_MADE_WITH = "environment"
_PARAMETERS = ("weight", "weight_scale", "weight_zero_point")
_MASTER = "master"  # the weight before it was rounded


def made_with(device: torch.device) -> dict[str, Any]:
    """Return versions, and on a CPU threads, that the bits of a run depend on."""
    packages = ("rac-modifier", "torch", "transformers", "llmcompressor", "compressed-tensors")
    threads = {"threads (OMP_NUM_THREADS)": torch.get_num_threads()} if device.type == "cpu" else {}
    return {_MADE_WITH: {**{name: version(name) for name in packages}, **threads}}


def check_disk(
    output: Path, model: torch.nn.Module, modules: Iterable[torch.nn.Module], *, masters: bool
) -> None:
    """Refuse a run whose disk has too little room, before anything is sampled (RacError).

    Counted are the weights, dense and packed, the weights of the pruned `modules`, and with
    `masters` their float32 weights before rounding.
    """
    with disable_onloading():
        model_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
        weights = [module.get_parameter("weight") for module in modules]
        groups = sum(w.numel() * (w.element_size() + (4 if masters else 0)) for w in weights)
    check_room(output, 2 * model_bytes, groups)


class Resume:
    """Write pruned groups to files of `folder`, and restore a killed run's groups.

    Without a folder nothing is written.

    Attributes:
        names: the modules that were pruned before, with their files.

    Raises:
        RacError: the folder holds another run, or cannot be read or written.
    """

    def __init__(self, folder: Path | None = None, about: Mapping[str, Any] | None = None):
        self.names: dict[str, Path] = {}
        self._folder, self._about, self._begun = folder, dict(about or {}), False
        if folder is not None:
            self._check(self._about)
            place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
            if not (place.is_dir() and os.access(place, os.W_OK)):
                raise self._unwritable(f"{place} is not a folder that can be written to")

    def begin(self, about: Mapping[str, Any]) -> None:
        """Write and restore groups from here on; `about` was not known before sampling.

        Raises:
            RacError: as for the class.
        """
        if self._folder is None:
            return
        self._check(about)
        self._about |= about
        self._begun = True
        for path in sorted(self._folder.glob("group-*.safetensors")):
            try:
                with safe_open(path, framework="pt") as file:
                    self.names |= dict.fromkeys(file.metadata() or (), path)
            except (OSError, SafetensorError) as error:
                raise self._damaged(path, error) from error
        if self.names:
            logger.info(
                f"{len(self.names)} modules were pruned before the last run was stopped "
                f"({self._folder})"
            )

    def has(self, names: Sequence[str]) -> bool:
        """Return whether all of these modules were pruned."""
        return bool(names) and all(name in self.names for name in names)

    def restore(
        self, name: str, module: torch.nn.Module, masters: dict[str, torch.Tensor]
    ) -> dict[str, Any]:
        """Restore a module, and into `masters` its master; return its record.

        Raises:
            RacError: the file is damaged, or holds another shape than the module.
        """
        path = self.names[name]
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
        """Write groups that were solved in one call to one file.

        Solved again without the others, a group of the call would have other bits.

        Raises:
            RacError: the disk is full, or the folder cannot be written to.
        """
        if self._folder is None or not self._begun:
            return
        tensors: dict[str, torch.Tensor] = {}
        for name, module in modules.items():
            with align_module_device(module):
                for part in _PARAMETERS:
                    if hasattr(module, part):
                        tensor = getattr(module, part).detach().to("cpu", copy=True)
                        tensors[f"{name}.{part}"] = tensor.contiguous()
            if name in masters:
                tensors[f"{name}.{_MASTER}"] = masters[name].contiguous()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if not (self._folder / _ABOUT).exists():
                write_json_atomic(self._folder / _ABOUT, self._about)
            numbers = [int(p.stem[6:]) for p in self._folder.glob("group-*.safetensors")]
            path = self._folder / f"group-{max(numbers, default=-1) + 1:05}.safetensors"
            new = path.with_suffix(".new")
            try:
                save_file(tensors, new, {name: json.dumps(records[name]) for name in modules})
                with new.open("rb") as file:
                    os.fsync(file.fileno())
                os.replace(new, path)
            except BaseException:
                new.unlink(missing_ok=True)
                raise
        except (OSError, SafetensorError, RacError) as error:
            raise self._unwritable(error) from error

    def remove(self) -> None:
        """Remove the folder, when the result of the run is saved."""
        if self._folder is not None:
            remove_folder(self._folder)

    def _check(self, about: Mapping[str, Any]) -> None:
        """Refuse a folder of another run."""
        assert self._folder is not None
        if not (self._folder / _ABOUT).exists():
            return
        before = read_json(self._folder / _ABOUT)
        for key, value in about.items():
            if before.get(key) == value or key == _STORES:
                continue
            changes = _changes(before.get(key), value)
            if key == _CALIBRATION:
                changes = _changes(before.get(_STORES), about.get(_STORES))
            raise RacError(
                f"{self._folder} holds what a run with another {key} has pruned{changes}; "
                "start that run again to go on with it, or remove the folder to start anew"
            )

    def _unwritable(self, why: object) -> RacError:
        return RacError(
            f"{self._folder}: what is pruned so far cannot be kept there ({why}); make "
            "room or name another output_dir. The same run, started again, goes on from "
            "the groups that were written"
        )

    def _damaged(self, path: Path, error: object) -> RacError:
        return RacError(f"{path}: cannot be read ({error}); remove {self._folder} to start anew")


def _changes(old: Any, new: Any) -> str:
    """Return the first settings that differ, for a message; "" if they are not known."""
    if not (isinstance(old, Mapping) and isinstance(new, Mapping)):
        return ""
    before, now = _flat(old), _flat(new)
    changed = sorted(key for key in {**before, **now} if before.get(key) != now.get(key))
    shown = [f"{key}: {before.get(key)!r} there, {now.get(key)!r} here" for key in changed[:3]]
    return f" ({'; '.join(shown)})" if shown else ""


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat
