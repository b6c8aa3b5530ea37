"""The dense model's own completions of held-out problems, on which divergence is measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from rac_modifier.errors import RacError
from rac_modifier.evaluation.teacher_forcing import TokenSequence
from rac_modifier.problems.source import Problem
from rac_modifier.sampling.generate import generate
from rac_modifier.sampling.prompts import render_question
from rac_modifier.settings.sampling import SamplingSettings


def sample_sequences(
    model: Any,
    tokenizer: Any,
    problems: Sequence[Problem],
    sampling: SamplingSettings,
    *,
    progress: bool = True,
) -> list[TokenSequence]:
    """Complete each problem `samples_per_problem` times, as traces are sampled.

    Use problems that were not calibrated on (`held_out_problems`).

    Raises:
        RacError: no problems, a prompt that cannot be rendered, or what `generate` raises.
    """
    if not problems:
        raise RacError(
            "no problems to sample on; give at least one (check the problem source and its limit)"
        )
    requests = [
        (f"{p.id}#{i}", p.question) for p in problems for i in range(sampling.samples_per_problem)
    ]
    sequences: list[TokenSequence] = []
    with tqdm(
        total=len(requests), desc="own samples", unit="sample", disable=None if progress else True
    ) as bar:
        for start in range(0, len(requests), sampling.batch_size):
            batch = requests[start : start + sampling.batch_size]
            prompts = [render_question(tokenizer, q, sampling) for _, q in batch]
            generations = generate(model, tokenizer, prompts, sampling, [key for key, _ in batch])
            sequences.extend(
                ((*p, *g.ids), len(p)) for p, g in zip(prompts, generations, strict=True)
            )
            bar.update(len(batch))
    return sequences
