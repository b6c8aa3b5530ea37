"""What `rac frontier --check` says about a grid beside its rows: how long it takes, and whether it fits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rac_modifier.cli.benchmarks import protocol_of

if TYPE_CHECKING:
    from rac_modifier.frontier.estimate import Plan
    from rac_modifier.settings.grid import GridEvaluation, PlannedRow


def plan_of(skeleton: Any, planned: Sequence[PlannedRow], evaluation: GridEvaluation) -> Plan:
    """What a grid will run.

    Args:
        skeleton: the model, with shapes.
        planned: its rows, checked.
        evaluation: of all models.

    Raises:
        RacError: a benchmark that does not exist.
    """
    from rac_modifier.frontier.estimate import Asked, ModelShape, Plan
    from rac_modifier.settings.recipe import check_entry, find_named_entry, has_entry

    entries = [
        check_entry(entry, run.label, name)
        for run in planned
        if has_entry(run.recipe)
        for name, entry in [find_named_entry(run.recipe, run.label)]
    ]
    # rows of upstream's modifiers alone, such as round-to-nearest, calibrate on nothing
    tokens = max((entry.calibration.tokens for entry in entries), default=1)
    longest = max((entry.traces.sampling.max_new_tokens for entry in entries), default=1)
    at_once = evaluation.in_progress
    asked = [Asked("answers and KL", evaluation.problems, evaluation.cap, evaluation.batch_size, served=False)]
    if evaluation.serve:
        asked.append(Asked("tokens per second", evaluation.problems, evaluation.cap, at_once, served=True))
    for benchmark in evaluation.benchmarks:
        protocol = protocol_of(benchmark)
        assert protocol.preset is not None
        answers = (protocol.problems or protocol.preset.problems) * protocol.samples
        asked.append(Asked(benchmark.preset, answers, protocol.cap, at_once, evaluation.serve))
    traces = Asked("traces", max(1, round(tokens / longest)), longest, at_once, evaluation.serve)
    return Plan(ModelShape.of(skeleton), len(planned), tokens, traces, tuple(asked), evaluation.serve)


def forecast(plan: Plan, out: Path, *, keep_models: bool) -> list[str]:
    """Lines: the estimated time, and the room.

    Raises:
        RacError: too little memory or disk.
    """
    import torch

    from rac_modifier.frontier.estimate import Speed, describe, estimate

    lines = check(plan, out, keep_models=keep_models)
    dtype = torch.bfloat16 if plan.shape.itemsize == 2 else torch.float32
    return [describe(estimate(plan, Speed.measured(dtype))), *lines]


def check(plan: Plan, out: Path, *, keep_models: bool) -> list[str]:
    """Refuse a plan that does not fit this machine (RacError); else a line per resource."""
    from rac_modifier.frontier.room import Room, check_room, needs

    return check_room(needs(plan, keep_models=keep_models), Room.here(out))
