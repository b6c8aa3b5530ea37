"""Keep what a run has pruned next to its output, for a run that is killed.

A run that goes on restores the pruned weights and repeats the forward passes, so it ends with the
same weights. The model, the recipe, the calibration set, versions and threads are compared.
"""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import IO, Any

import torch
from compressed_tensors.offload import disable_onloading
from compressed_tensors.utils import align_module_device
from loguru import logger
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rac_modifier.checkpoint.files import write_tensors_atomic
from rac_modifier.checkpoint.output_folder import check_room
from rac_modifier.errors import RacError, refusing
from rac_modifier.llmcompressor.solving import Pruned
from rac_modifier.runtime.files import hold, read_json, remove_folder, write_json_atomic

_ABOUT = "about.json"
_CALIBRATION = "calibration set"
_STORES = "trace stores"  # may have grown; named if the calibration set differs
_PARAMETERS = ("weight", "weight_scale", "weight_zero_point", "weight_global_scale")
_MASTER = "master"  # the weight before it was rounded
_ELSEWHERE = "name another output_dir"


def check_disk(
    output: Path, model: torch.nn.Module, modules: Iterable[torch.nn.Module], *, masters: bool
) -> None:
    """Refuse a run whose disk has too little room (RacError); float32 `masters` are kept too."""
    with disable_onloading():
        model_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
        weights = [module.get_parameter("weight") for module in modules]
        groups = sum(w.numel() * (w.element_size() + (4 if masters else 0)) for w in weights)
    check_room(output, 2 * model_bytes, groups)


class Resume:
    """Write each pruned group to a file of `folder`, if there is one; restore a killed run.

    The folder is locked until `remove`. A run that failed yields it to the next of its process.
    """

    def __init__(self, folder: Path | None = None, about: Mapping[str, Any] | None = None):
        self.names: dict[str, Path] = {}
        self._folder, self._about, self._begun = folder, dict(about or {}), False
        self._lock: IO[str] | None = None
        if folder is not None:
            place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
            if not (place.is_dir() and os.access(place, os.W_OK)):
                raise self._unwritable(f"{place} is not a folder that can be written to")
            self._lock = hold(folder, _ELSEWHERE, take_over=True)
            try:
                self._check(self._about)
            except BaseException:
                self._lock.close()
                raise

    def begin(self, about: Mapping[str, Any]) -> None:
        """Write and restore groups from here on; `about` was not known before sampling."""
        if self._folder is None:
            return
        self._check_held()
        self._check(about)
        self._about |= about
        self._begun = True
        for path in sorted(self._folder.glob("group-*.safetensors")):
            with self._reading(path), safe_open(path, framework="pt") as file:
                self.names |= dict.fromkeys(file.metadata() or (), path)
        if self.names:
            logger.info(
                f"{len(self.names)} modules were pruned until the last run stopped ({self._folder})"
            )

    def restored(self, name: str, module: torch.nn.Module) -> Pruned:
        """Return what an earlier run has pruned of a module."""
        path, tensors = self.names[name], {}
        with self._reading(path), safe_open(path, framework="pt") as file:
            record: dict[str, Any] = json.loads(file.metadata()[name])
            for key in file.keys():  # noqa: SIM118 - no mapping
                owner, _, part = key.rpartition(".")
                if owner != name:
                    continue
                tensor = file.get_tensor(key)
                if part != _MASTER and module.get_parameter(part).shape != tensor.shape:
                    raise ValueError(f"{key} has the shape {tuple(tensor.shape)}")
                tensors[part.removeprefix("weight_")] = tensor
            return Pruned(record, **tensors)

    def add(
        self,
        modules: Mapping[str, torch.nn.Module],
        records: Mapping[str, dict[str, Any]],
        masters: Mapping[str, Tensor],
    ) -> None:
        """Write groups that were solved in one call to one file: alone they have other bits."""
        if self._folder is None or not self._begun:
            return
        self._check_held()
        tensors: dict[str, Tensor] = {}
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
            write_tensors_atomic(path, tensors, {n: json.dumps(records[n]) for n in modules})
        except (OSError, SafetensorError, RacError) as error:
            raise self._unwritable(error) from error

    def remove(self) -> None:
        """Remove the folder, when the result of the run is saved."""
        if self._folder is not None and self._lock is not None and not self._lock.closed:
            remove_folder(self._folder)
            self._lock.close()

    def leave(self) -> None:
        """Remove the folder of a run that failed, if it holds no group."""
        if self._folder is not None and not (self._folder / _ABOUT).exists():
            self.remove()

    def _check_held(self) -> None:
        """Refuse to go on where a later run of this process has the folder (RacError)."""
        if self._lock is None or self._lock.closed:
            why = "is in use by a later run of this process; wait for it"
            raise RacError(f"{self._folder} {why}, or {_ELSEWHERE}")

    def _check(self, about: Mapping[str, Any]) -> None:
        """Refuse a folder of another run."""
        assert self._folder is not None
        if not (self._folder / _ABOUT).exists():
            return
        before = read_json(self._folder / _ABOUT)
        for key, value in about.items():
            if before.get(key) == value or key == _STORES:
                continue
            shown = _STORES if key == _CALIBRATION else key
            changes = "; ".join(islice(_changes(before.get(shown), about.get(shown)), 3))
            raise RacError(
                f"{self._folder} holds what a run with another {key} has pruned"
                f"{changes and f' ({changes})'}; start that run again to go on with it, or remove "
                "the folder to start anew"
            )

    def _unwritable(self, why: object) -> RacError:
        return RacError(
            f"{self._folder}: what is pruned so far cannot be kept there ({why}); make room or "
            "name another output_dir. The same run goes on from the groups that were written"
        )

    def _reading(self, path: Path) -> contextlib.AbstractContextManager[None]:
        step = f"remove {self._folder} to start anew"
        damage = (OSError, SafetensorError, AttributeError, KeyError, TypeError, ValueError)
        return refusing(f"{path}: cannot be read", step, *damage)


def _changes(before: Any, now: Any, name: str = "") -> Iterator[str]:
    """Yield the settings that differ, below mappings."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in sorted({**before, **now}):
            yield from _changes(before.get(key), now.get(key), f"{name}.{key}" if name else key)
    elif name and before != now:
        yield f"{name}: {before!r} there, {now!r} here"
