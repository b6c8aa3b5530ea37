"""What a run has pruned so far, in a folder beside its output: a run that was killed goes on from there when it starts again.

Activations are not kept. A run that goes on puts the pruned weights back and repeats the forward passes, so its calibration sees
the same activations, and it ends with the same weights, on the same machine: with other versions or another number of threads it
is refused. Statistics are not kept, nor a digest of them: those of a group that is there are not computed again, so there is
nothing to compare a digest with. What they depend on is compared: model, recipe, calibration set, versions and threads.
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

_SAVE_SECONDS = (
    30.0  # groups that are pruned within this time are written together; a kill loses no more
)
_ABOUT = "about.json"
_CALIBRATION = "calibration set"
_STORES = "trace stores"  # not compared, since a store may have grown: named where the calibration set is another
_MADE_WITH = "made with"
_PARAMETERS = ("weight", "weight_scale", "weight_zero_point")
_MASTER = "master"  # the weight before it was rounded


def made_with(device: torch.device) -> dict[str, Any]:
    """What the bits of a run on `device` depend on beside its settings: versions, and on a CPU the number of threads."""
    packages = ("rac-modifier", "torch", "transformers", "llmcompressor", "compressed-tensors")
    threads = {"threads (OMP_NUM_THREADS)": torch.get_num_threads()} if device.type == "cpu" else {}
    return {_MADE_WITH: {**{name: version(name) for name in packages}, **threads}}


def check_disk(
    output: Path, model: torch.nn.Module, modules: Iterable[torch.nn.Module], *, masters: bool
) -> None:
    """Refuse a run whose disk has too little room, before anything is sampled.

    Counted are the weights, dense and packed, and those of the pruned `modules`, which are kept until the end; with `masters`
    also as they were before they were rounded, in float32.

    Raises:
        RacError: with the bytes that are free and needed.
    """
    with disable_onloading():
        whole = sum(p.numel() * p.element_size() for p in model.parameters())
        weights: list[torch.Tensor] = [module.weight for module in modules]  # type: ignore[misc]
        groups = sum(w.numel() * (w.element_size() + (4 if masters else 0)) for w in weights)
    check_room(output, 2 * whole, groups)


class FinishedGroups:
    """The modules that are pruned already, with their records.

    Attributes:
        folder: files of groups, each written whole or not at all, and `about.json`, which says what run they are of.

    Raises:
        RacError: what is there is of another run (another recipe, model or version) or cannot be read, or nothing can be
            written there.
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
        """From here on groups are written and restored; `about` is what was not known before, such as the calibration set.

        Raises:
            RacError: as for the class.
        """
        self._check(about)
        self._about |= about
        self._begun = True
        self._places = {
            name: file
            for file in sorted(self.folder.glob("group-*.safetensors"))
            for name in _names(file)
        }
        if self._places:
            logger.info(
                f"{len(self._places)} modules were pruned before the last run was stopped ({self.folder})"
            )

    def has(self, names: Sequence[str]) -> bool:
        """Whether all of these modules are there."""
        return self._begun and bool(names) and all(name in self._places for name in names)

    def restore(
        self, name: str, module: torch.nn.Module, masters: dict[str, torch.Tensor]
    ) -> dict[str, Any]:
        """Put the weights of a module back, and into `masters` its weight before it was rounded; returns its record.

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
            own = getattr(module, part, None)
            if own is None or own.shape != tensor.shape:
                raise self._damaged(path, f"{name}.{part} has the shape {tuple(tensor.shape)}")
            update_offload_parameter(module, part, tensor)
        return record

    def add(
        self,
        modules: Mapping[str, torch.nn.Module],
        records: Mapping[str, dict[str, Any]],
        masters: Mapping[str, torch.Tensor],
    ) -> None:
        """A group is pruned, or several that may have been solved at once: written now, or with those after it.

        They are all there afterwards or none: solved again without the others, the rest would have other bits.

        Raises:
            RacError: the disk is full, or the folder cannot be written. What was written before stays.
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
        """The run has ended, and its result is saved."""
        remove_folder(self.folder)

    def _write(self) -> None:
        tensors, records = {}, {}
        for name, (module, record, master) in self._pending.items():
            with align_module_device(module):
                for part in _PARAMETERS:
                    if hasattr(module, part):
                        tensors[f"{name}.{part}"] = (
                            getattr(module, part).detach().to("cpu", copy=True).contiguous()
                        )
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
        """One after the last file, so that none is overwritten where others are missing."""
        return (
            max(
                (
                    int(file.stem.removeprefix("group-"))
                    for file in self.folder.glob("group-*.safetensors")
                ),
                default=-1,
            )
            + 1
        )

    def _check(self, about: Mapping[str, Any]) -> None:
        """Refuse what is there if it says otherwise."""
        if not (self.folder / _ABOUT).exists():
            return  # nothing was written, or not even this
        there = read_json(self.folder / _ABOUT)
        for key, value in about.items():
            old = there.get(key)
            if old == value or key == _STORES:
                continue
            if key == _MADE_WITH:
                raise RacError(
                    f"{self.folder} holds what a run has pruned that was begun with {_changes(old or {}, value)}, and would not "
                    "end with the same bits: use the same, or remove the folder to start again"
                )
            because = _difference(old, value)
            before, now = there.get(_STORES) or {}, about.get(_STORES) or {}
            if key == _CALIBRATION and before and now and before != now:
                because = f", since a trace store is another one ({_changes(before, now)})"
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


def _names(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.metadata() or ())
    except (OSError, SafetensorError) as error:
        raise RacError(
            f"{path}: cannot be read ({error}); remove {path.parent} to start anew"
        ) from error


def _changes(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """What was and what is, of all that differs."""
    names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    return ", ".join(
        f"{name} {there.get(name, 'unknown')}, now {here.get(name, 'none')}" for name in names
    )


def _difference(there: Any, here: Any) -> str:
    """The first settings that differ, for a message; "" where nothing readable does."""
    if not (isinstance(there, dict) and isinstance(here, dict)):
        return "" if there is None or len(str(there)) > 40 else f" ({there!r} there, {here!r} here)"
    old, new = _flat(there), _flat(here)
    changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    return f" ({'; '.join(f'{key}: {old.get(key)!r} there, {new.get(key)!r} here' for key in changed[:3])})"


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= (
            _flat(value, f"{prefix}{key}.")
            if isinstance(value, Mapping)
            else {f"{prefix}{key}": value}
        )
    return flat
