"""The dense model's own completions, on which divergence is measured: sampled on held-out problems, or read from a store."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import islice
from typing import Any

from tqdm import tqdm

from rac_modifier.errors import RacError
from rac_modifier.evaluation.teacher_forcing import TokenSequence, sequence_of
from rac_modifier.problems.source import Problem
from rac_modifier.sampling.generate import generate
from rac_modifier.sampling.model_identity import model_fingerprint
from rac_modifier.sampling.prompts import render_question
from rac_modifier.settings.sampling import SamplingSettings
from rac_modifier.traces.store import TraceStore


def sample_sequences(
    model: Any,
    tokenizer: Any,
    problems: Sequence[Problem],
    sampling: SamplingSettings,
    *,
    progress: bool = True,
) -> list[TokenSequence]:
    """Complete each problem `samples_per_problem` times, as traces are sampled; answers are not needed.

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


def sequences_from_store(
    path: str | os.PathLike[str], dense: Any, *, limit: int | None = None
) -> list[TokenSequence]:
    """The first `limit` traces of a store (None: all) that this dense model wrote.

    Use a store that was not calibrated on: on its calibration set a pruned model looks better than it is.

    Raises:
        RacError: no such store, an empty one, one of another model, a limit below 1.
    """
    if limit is not None and limit < 1:
        raise RacError(f"limit={limit}: ask for at least one trace")
    store = TraceStore.read(path)
    if store.header.fingerprint != model_fingerprint(dense):
        raise RacError(
            f"trace store {str(store.path)!r} holds traces of another model ({store.header.model!r}), and divergence is "
            "measured on samples of the dense model itself; name its store, or sample anew"
        )
    sequences = [sequence_of(trace) for trace in islice(store, limit)]
    if not sequences:
        raise RacError(f"trace store {str(store.path)!r} holds no traces; collect some first")
    return sequences
