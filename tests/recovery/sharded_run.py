"""What test_student.py starts in each of two processes."""

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from rac_modifier.distributed.processes import Processes
from rac_modifier.distributed.torchrun import joined_processes
from rac_modifier.formats.encoding import Encoding
from rac_modifier.recovery import training_loop
from rac_modifier.recovery.on_grid import QuantizedWeight
from rac_modifier.recovery.training_loop import TrainingLoop
from rac_modifier.settings.recovery import RecoverySettings
from tests.recovery import recovery_helpers
from tests.recovery.recovery_helpers import Killed, dense_and_sparse
from tests.tiny import linears

NAME = "model.layers.1.mlp.up_proj"


def run(kind: str, processes: Processes, state: Path | None = None) -> tuple[Any, Any]:
    """A short recovery of the tiny model: "plain", "recomputed" or "quantized".

    Batches are of 1 to 3 sequences: in some, a process has none.
    """
    dense, model = dense_and_sparse()
    sizes = {"learning_rate": 3e-3, "step_tokens": 150, "batch_tokens": 90}
    settings = RecoverySettings(**sizes, activation_checkpointing=kind == "recomputed")
    quantized = {}
    for name, linear in linears(model).items() if kind == "quantized" else ():
        weight = linear.weight.detach()
        scale = (weight.unflatten(1, (-1, 32)).abs().amax(-1) / 7.5).clamp(min=1e-6)
        quantized[name] = QuantizedWeight(Encoding("int", 4, 32), scale, weight.clone())
    options = {"quantized": quantized, "processes": processes, "state": state}
    return recovery_helpers.run(model, dense, settings, (24, 5), **options), model


def main() -> None:
    """FOLDER: run every kind, and a run that is killed and goes on."""
    folder, step = Path(sys.argv[1]), TrainingLoop.step
    training_loop._SAVE_SECONDS = 0.0
    with joined_processes() as processes:
        for kind in ("plain", "recomputed", "quantized"):
            result, model = run(kind, processes)
            if processes.is_first:
                curve = torch.tensor([kl for _, kl in result.curve], dtype=torch.float64)
                tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
                tensors |= {"curve": curve, "steps": torch.tensor(result.steps)}
                if kind != "plain":
                    del tensors["steps"]
                save_file(tensors, folder / f"{kind}.safetensors")
        held: list[int] = []
        for kill_at in (3, None):
            steps = 0

            def killed(self: Any, batches: Any, kill_at: int | None = kill_at) -> float:
                nonlocal steps
                steps += 1
                if steps == kill_at:
                    raise Killed
                held.append(sum(self.student.local(p).numel() for p in self.parameters.values()))
                return step(self, batches)

            TrainingLoop.step = killed  # type: ignore[method-assign]
            try:
                result, model = run("plain", processes, folder / "state")
            except Killed:
                continue
        weight = model.get_parameter(f"{NAME}.weight").detach()
        counts = {"steps": torch.tensor(steps), "held": torch.tensor(held)}
        save_file({"weight": weight, **counts}, folder / f"killed-{processes.rank}.safetensors")
