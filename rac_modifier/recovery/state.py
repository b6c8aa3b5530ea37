"""The state of a recovery run: weights, Adam's moments and the best weights, in a file.

All processes gather it and the first writes it, so a run may go on with another number of them.
"""

import contextlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rac_modifier.checkpoint.files import write_tensors_atomic
from rac_modifier.errors import refusing
from rac_modifier.recovery.student import Student

_FILE = "recovery.safetensors"


@dataclass
class Progress:
    """Hold where a run is."""

    key: str  # hash of model, sequences and settings; a state with another key is not used
    step: int = 0  # of the present try
    best: dict[str, Tensor] = field(default_factory=dict)  # weights, lowest held-out KL
    best_step: int = 0
    best_kl: float = float("inf")  # nats per token
    curve: list[tuple[int, float]] = field(default_factory=list)  # step and KL of every check
    stopped: str = ""  # why the present try ended early
    tries: int = 0  # how often the learning rate was lowered

    def save(self, folder: Path, student: Student, optimizer: torch.optim.Optimizer) -> None:
        """Write a new file, and replace the old one, which remains on an error (RacError)."""
        entries = [("best", name, tensor) for name, tensor in self.best.items()]
        for name, parameter in student.parameters.items():
            entries.append(("weight", name, parameter))
            entries += [(part, name, value) for part, value in optimizer.state[parameter].items()]
        tensors = {}
        for part, name, tensor in entries:
            gathered = student.whole(name, student.local(tensor)) if tensor.dim() else tensor.cpu()
            if student.processes.is_first:
                tensors[f"{part}/{name}"] = gathered.contiguous()
        if not student.processes.is_first:
            return
        about = {name: value for name, value in vars(self).items() if name != "best"}
        problem = f"{folder}: the state of the recovery run cannot be written"
        step = "make room, then start the same command again: it goes on after the last state"
        with refusing(problem, step, OSError, SafetensorError):
            folder.mkdir(parents=True, exist_ok=True)
            write_tensors_atomic(folder / _FILE, tensors, {"about": json.dumps(about)})

    @classmethod
    @torch.no_grad()
    def load(
        cls, folder: Path, key: str, student: Student, optimizer: torch.optim.Optimizer
    ) -> Self:
        """Restore weights and moments, which the first rank reads and sends (RacError).

        Without this state return a new `Progress`.
        """
        path, processes = folder / _FILE, student.processes
        problem = f"{path}: the state of a recovery run cannot be read"
        damage = (OSError, SafetensorError, KeyError, json.JSONDecodeError, TypeError)
        with (
            refusing(problem, "remove it to start anew", *damage),
            contextlib.ExitStack() as stack,
        ):
            file, about = None, {}
            if processes.is_first and path.exists():
                file = stack.enter_context(safe_open(path, framework="pt"))
                about = json.loads(file.metadata()["about"]) | {"names": list(file.keys())}
            about = processes.from_first(about)
            # a state of other weights, sequences or settings would train something else
            if about.pop("key", None) != key:
                return cls(key)
            names = about.pop("names")
            about["curve"] = [(step, kl) for step, kl in about["curve"]]
            progress = cls(key, **about)
            for name in names:
                part, _, of = name.partition("/")
                tensor = processes.send(file.get_tensor(name) if file is not None else None).cpu()
                parameter = student.parameters[of]
                if part == "step":
                    optimizer.state[parameter][part] = tensor.to(parameter.device)
                elif part == "best":
                    progress.best[of] = student.shard(tensor).clone()
                elif part == "weight":
                    student.local(parameter).copy_(student.shard(tensor))
                else:
                    moment = student.shard(tensor).clone()
                    optimizer.state[parameter][part] = student.like(of, moment)
        return progress
