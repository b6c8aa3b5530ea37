"""What test_sharded_processes.py starts in each of two processes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from rac_modifier.processes import Processes, joined_processes
from rac_modifier.quantization.grid import Grid
from rac_modifier.recovery.distill import recover
from rac_modifier.recovery.on_grid import QuantizedWeight
from rac_modifier.recovery.training_loop import TrainingLoop
from rac_modifier.settings.recovery import RecoverySettings
from tests.recovery.recovery_helpers import LiveTeacher, dense_and_sparse, sequences
from tests.tiny import linears

# Batches of 1 to 3 sequences: in some, a process has none.
SETTINGS = RecoverySettings(learning_rate=3e-3, step_tokens=150, batch_tokens=90)
NAME = "model.layers.1.mlp.up_proj"


def run(
    kind: str, processes: Processes, state: Path | None = None, passes: int = 1
) -> tuple[Any, Any]:
    """A short recovery of the tiny model: "plain", "recomputed" or "quantized"."""
    dense, model = dense_and_sparse()
    quantized = {}
    if kind == "quantized":
        for name, linear in linears(model).items():
            weight = linear.weight.detach()
            scale = (weight.reshape(len(weight), -1, 32).abs().amax(-1) / 7.5).clamp(min=1e-6)
            quantized[name] = QuantizedWeight(Grid("int", 4, 32), scale, weight.clone())
    settings = SETTINGS.model_copy(
        update={"activation_checkpointing": kind == "recomputed", "passes": passes}
    )
    result = recover(
        model,
        LiveTeacher(dense),
        sequences(24, seed=1),
        sequences(5, seed=2),
        settings,
        quantized=quantized,
        processes=processes,
        state=state,
        save_seconds=0.0,
        progress=False,
    )
    return result, model


class Killed(BaseException):
    """Ends a run as a kill does."""


def main() -> None:
    """FOLDER: run every kind, and one that is killed and goes on; the first process leaves the weights, both their number of
    them."""
    folder = Path(sys.argv[1])
    step = TrainingLoop.step
    with joined_processes() as processes:
        for kind in ("plain", "recomputed", "quantized"):
            result, model = run(kind, processes)
            if processes.is_first:
                curve = torch.tensor([kl for _, kl in result.curve], dtype=torch.float64)
                tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
                save_file({**tensors, "curve": curve}, folder / f"{kind}.safetensors")
        held = []
        for kill_at in (3, None):
            steps = 0

            def killed(self: Any, batches: Any, kill_at: int | None = kill_at) -> float:
                nonlocal steps
                steps += 1
                if steps == kill_at:
                    raise Killed
                held.append(sum(self.shards.local(p).numel() for p in self.parameters.values()))
                return step(self, batches)

            TrainingLoop.step = killed  # type: ignore[method-assign]
            try:
                result, model = run("plain", processes, folder / "state")
            except Killed:
                continue
        save_file(
            {
                "weight": model.get_parameter(f"{NAME}.weight").detach(),
                "steps": torch.tensor(steps),
                "held": torch.tensor(held),
            },
            folder / f"killed-{processes.rank}.safetensors",
        )
