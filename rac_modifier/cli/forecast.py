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

    entries, autorounded = [], 0
    for run in (
        planned
    ):  # rows of upstream's modifiers alone, such as round-to-nearest, calibrate on nothing
        if has_entry(run.recipe):
            name, content = find_named_entry(run.recipe, run.label)
            entries.append(check_entry(content, run.label, name))
            autorounded += _autorounded(run.recipe, entries[-1].traces.sampling.max_new_tokens)
    recovers = [entry.recover for entry in entries if entry.recover]
    tokens = max((entry.calibration.tokens for entry in entries), default=1)
    sampled = tokens + max((recover.reserved_tokens for recover in recovers), default=0)
    longest = max((entry.traces.sampling.max_new_tokens for entry in entries), default=1)
    at_once = evaluation.in_progress
    asked = [
        Asked(
            "answers and KL",
            evaluation.problems,
            evaluation.cap,
            evaluation.batch_size,
            served=False,
        )
    ]
    if evaluation.serve:
        asked.append(
            Asked("tokens per second", evaluation.problems, evaluation.cap, at_once, served=True)
        )
    for benchmark in evaluation.benchmarks:
        protocol = protocol_of(benchmark)
        assert protocol.preset is not None
        answers = (protocol.problems or protocol.preset.problems) * protocol.samples
        asked.append(Asked(benchmark.preset, answers, protocol.cap, at_once, evaluation.serve))
    traces = Asked("traces", max(1, round(sampled / longest)), longest, at_once, evaluation.serve)
    return Plan(
        ModelShape.of(skeleton),
        len(planned),
        tokens,
        traces,
        tuple(asked),
        evaluation.serve,
        recovered=sum(recover.tokens * recover.passes for recover in recovers),
        autorounded=autorounded,
    )


def _autorounded(recipe: dict[str, Any], longest: int) -> int:
    """Tokens that AutoRoundModifier passes through each layer, whose rows have as many as the longest sequence, up to a limit."""
    from rac_modifier.calibration.loader import ROW_TOKENS

    modifiers = [
        modifier
        for stage in recipe.values()
        for group in stage.values()
        for modifier in group.items()
    ]
    return sum(
        settings.get("iters", 200) * settings.get("batch_size", 8) * min(longest, ROW_TOKENS)
        for name, settings in modifiers
        if name == "AutoRoundModifier" and settings
    )


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
