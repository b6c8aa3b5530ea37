"""A model of a frontier measured: bytes, answers to the held-out problems, and divergence."""

import math
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from rac_modifier.checkpoint.files import TensorFiles
from rac_modifier.checkpoint.inspect import is_fp4
from rac_modifier.evaluation.accuracy import row_of
from rac_modifier.evaluation.results import EvalResult, PairedDifference, Row
from rac_modifier.formats.module_names import Role
from rac_modifier.measure.divergence import DenseReference, DivergenceResult, TokenDivergence
from rac_modifier.problems.source import Problem
from rac_modifier.sampling.generate import (
    Generation,
    eos_token_ids,
    render_question,
    sample_sequences,
)
from rac_modifier.settings.sampling import SamplingSettings

MOST_TRACES = 300  # problems whose traces are kept; figures are of all problems
_BROKEN = "\ufffd"  # what a decoder writes for a part of a character
# Last part of the names of a matrix that is packed or quantized.
_PART = re.compile(
    r"compressed|bitmask|row_offsets|weight_(packed|scale|global_scale|zero_point|g_idx)"
)


@dataclass(frozen=True)
class HeldOut:
    """The problems that every model is asked, and how."""

    problems: Sequence[Problem]
    sampling: SamplingSettings

    @property
    def graded(self) -> bool:
        """Return whether every problem has an answer to check against."""
        return all(problem.answer and problem.answer.strip() for problem in self.problems)


Measured = tuple[dict[str, Any], list[dict[str, Any]]]  # figures for a row, and its traces


def measure_dense(model: Any, tokenizer: Any, held_out: HeldOut) -> Measured:
    """Measure the dense model's answers, which all other models are compared with."""
    answers, figures, rows = _answer(model, tokenizer, held_out, "dense")
    answered = zip(held_out.problems, answers, rows, strict=True)
    return figures, [_trace_of(tokenizer, *values) for values in answered]


def measure(
    label: str, model: Any, dense: Any, tokenizer: Any, held_out: HeldOut, reference: Measured
) -> Measured:
    """Measure a model's answers, and its divergence on the dense model's, the `reference`."""
    answers, figures, rows = _answer(model, tokenizer, held_out, label)
    dense_figures, dense_traces = reference
    dense_answers = [Generation(tuple(trace["ids"]), trace["finish"]) for trace in dense_traces]
    sequences = []
    for problem, answer in zip(held_out.problems, dense_answers, strict=True):
        prompt = render_question(tokenizer, problem.question, held_out.sampling)
        sequences.append(((*prompt, *answer.ids), len(prompt)))
    tokens = DenseReference(dense, sequences).divergence_per_token(model, label)
    figures["divergence"] = asdict(DivergenceResult.of(tokens, label))
    if held_out.graded:
        both = (dense_figures, figures)
        first, second = (EvalResult.model_validate(row["accuracy"]) for row in both)
        figures["paired"] = asdict(PairedDifference.of(first, second))
    shown = list(zip(held_out.problems, answers, rows, dense_answers, tokens, strict=True))
    return figures, [_trace_of(tokenizer, *values) for values in shown[:MOST_TRACES]]


def _answer(
    model: Any, tokenizer: Any, held_out: HeldOut, label: str
) -> tuple[list[Generation], dict[str, Any], list[Row]]:
    """Return answers, figures, and a row per answer."""
    sampling, started = held_out.sampling, time.monotonic()
    ends = set(eos_token_ids(model, tokenizer))
    prompts, answers = [], []
    for ids, start in sample_sequences(model, tokenizer, held_out.problems, sampling):
        stopped = ids[start:] and ids[-1] in ends
        prompts.append(ids[:start])
        answers.append(Generation(tuple(ids[start:]), "stop" if stopped else "length"))
    seconds = time.monotonic() - started
    asked = zip(held_out.problems, prompts, answers, strict=True)
    rows = [row_of(tokenizer, *answered, None) for answered in asked]
    result = EvalResult.of(rows, label=label, seconds=seconds, sampling=sampling)
    figures = {
        "thinking": result.mean_thinking_tokens,
        "truncated": result.unfinished_share,
        "accuracy": result.model_dump() if held_out.graded else None,
        "divergence": None,
        "paired": None,
    }
    return answers, figures, rows


def _trace_of(
    tokenizer: Any,
    problem: Problem,
    answer: Generation,
    row: Row,
    dense: Generation | None = None,
    divergence: TokenDivergence | None = None,
) -> dict[str, Any]:
    """Return a trace in plain values; `divergence` is on the answer `dense`."""
    pieces = _pieces_of(tokenizer, answer.ids)
    loop = row.ending.loop
    trace: dict[str, Any] = {
        "id": problem.id,
        "ids": list(answer.ids),
        "text": "".join(pieces),
        "correct": row.correct,
        "finish": answer.finish_reason,
        "kind": row.ending.kind,
        "loop": loop and loop.character(pieces),
    }
    if dense is None or divergence is None:
        question = {"question": problem.question, "answer": problem.answer}
        return trace | question | {"pieces": [len(piece) for piece in pieces]}
    pairs = zip(answer.ids, dense.ids, strict=False)
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    characters, kl = sum(map(len, pieces[:same])), [round(value, 4) for value in divergence.kl]
    return trace | {"same_tokens": same, "same_characters": characters, "kl": kl}


def _pieces_of(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Return the text of each token; a character of several tokens belongs to the last of them."""
    pieces, before, read = [], 0, 0
    for i in range(len(ids)):
        # from the token before, since some tokenizers drop the space of a first token
        old = tokenizer.decode(list(ids[before:read]))
        new = tokenizer.decode(list(ids[before : i + 1]))
        if i + 1 < len(ids) and new.endswith(_BROKEN):
            pieces.append("")
            continue
        pieces.append(new[len(old) :])
        before, read = read, i + 1
    return pieces


def checkpoint_bytes(folder: str | Path) -> dict[str, int | float]:
    """Return the `total` bytes, those of `matrices`, and the `bits_per_weight` of the matrices.

    `matrices` include masks, offsets and scales, and neither head nor embeddings.
    """
    total = matrices = weights = 0
    with TensorFiles(folder) as files:
        for name in files.where:
            module, _, part = name.rpartition(".")
            size, shape = files.nbytes(name), files.shape(name)
            total += size
            if Role.of(module).of_vocabulary:
                continue
            if part == "weight" and len(shape) == 2:
                matrices += size
                weights += shape[0] * shape[1]
            elif _PART.fullmatch(part):
                matrices += size
                if is_fp4(files, name):
                    weights += 2 * math.prod(shape)
            elif part in ("shape", "weight_shape"):
                rows, columns = files.tensor(name).flatten().tolist()
                weights += rows * columns
    bits = 8 * matrices / weights if weights else 0.0
    return {"total": total, "matrices": matrices, "bits_per_weight": bits}
