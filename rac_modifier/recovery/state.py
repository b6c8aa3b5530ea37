"""The state of a recovery run: weights, Adam's moments and the best weights so far, in one file that is replaced whole."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from rac_modifier.errors import RacError

_FILE = "recovery.safetensors"


@dataclass
class Progress:
    """Where a run is.

    Attributes:
        key: what the run is of (model, sequences, settings); a state of another run is not used.
        step: steps done in the present try.
        best: weights with the lowest held-out KL so far, by parameter name; empty: the weights before the first step.
        best_step, best_kl: when that was, and its KL in nats per token.
        curve: (step, held-out KL) of every check.
        stopped: why the present try ended early, or "".
        tries: how often the learning rate was lowered.
    """

    key: str
    step: int = 0
    best: dict[str, torch.Tensor] = field(default_factory=dict)
    best_step: int = 0
    best_kl: float = float("inf")
    curve: list[tuple[int, float]] = field(default_factory=list)
    stopped: str = ""
    tries: int = 0


def save_state(
    folder: Path, progress: Progress, parameters: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    """Write everything to a new file and put it in the place of the old one.

    Raises:
        RacError: the disk is full or the folder cannot be written; the old file then stands.
    """
    tensors = {f"best/{name}": tensor for name, tensor in progress.best.items()}
    for name, parameter in parameters.items():
        tensors[f"weight/{name}"] = parameter.detach()
        for part, value in optimizer.state[parameter].items():
            tensors[f"{part}/{name}"] = value
    about = {
        "key": progress.key,
        "step": progress.step,
        "best_step": progress.best_step,
        "best_kl": progress.best_kl,
        "curve": progress.curve,
        "stopped": progress.stopped,
        "tries": progress.tries,
    }
    new = folder / f"{_FILE}.new"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous().cpu() for k, v in tensors.items()}, new, metadata={"about": json.dumps(about)})
        with new.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(new, folder / _FILE)
    except (OSError, SafetensorError) as error:
        new.unlink(missing_ok=True)
        raise RacError(
            f"{folder}: the state of the recovery run cannot be written ({error}); make room, then start the same command again: "
            "it goes on after the last state"
        ) from error


@torch.no_grad()
def load_state(
    folder: Path, key: str, parameters: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer
) -> Progress:
    """Put weights and moments back; a new `Progress` where there is no state of this run.

    Raises:
        RacError: a state that cannot be read.
    """
    path = folder / _FILE
    if not path.exists():
        return Progress(key)
    try:
        with safe_open(path, framework="pt") as file:
            about: dict[str, Any] = json.loads(file.metadata()["about"])
            if about.pop("key") != key:
                return Progress(key)
            progress = Progress(key, **{**about, "curve": [(step, kl) for step, kl in about["curve"]]})
            for name in file.keys():  # noqa: SIM118 - not a dict
                part, _, parameter = name.partition("/")
                tensor = file.get_tensor(name)
                if part == "best":
                    progress.best[parameter] = tensor
                elif part == "weight":
                    parameters[parameter].copy_(tensor)
                else:
                    optimizer.state[parameters[parameter]][part] = tensor.to(
                        parameters[parameter].device if part != "step" else "cpu"
                    )
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise RacError(
            f"{path}: the state of a recovery run cannot be read ({error}); remove it to start anew"
        ) from error
    return progress
