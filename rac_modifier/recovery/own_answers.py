"""Answers of the compressed model itself that end in copies: recovery trains on the copies."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loguru import logger
from transformers import PreTrainedTokenizerBase

from rac_modifier.measure.repeats import end_of_copies
from rac_modifier.measure.teacher_forcing import TokenSequence
from rac_modifier.runtime.files import read_json, write_text_atomic
from rac_modifier.sampling.generate import generate
from rac_modifier.sampling.model_identity import model_fingerprint
from rac_modifier.settings.sampling import SamplingSettings

_LEAST = 0.1  # share of the answers that end in copies, below which none is trained on
_LONGEST = 2  # cap of an answer: times the mean completion of the training traces


def copying_answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    training: Sequence[TokenSequence],
    sampling: SamplingSettings,
    path: Path,
) -> list[TokenSequence]:
    """Answer training prompts greedily; return the answers that end in copies, cut behind a few.

    Where fewer than a tenth end so, none is returned, and no further batch is asked for. What is
    returned is kept in `path`, and not sampled again for the same model and prompts.
    """
    prompts = list(dict.fromkeys(tuple(ids[:prompt]) for ids, prompt in training))
    completed = sum(len(ids) - prompt for ids, prompt in training)
    cap = min(sampling.max_new_tokens, _LONGEST * completed // len(training))
    about = {"model": model_fingerprint(model), "cap": cap, "prompts": list(map(list, prompts))}
    kept = read_json(path) if path.exists() else {}
    if about.items() <= kept.items():
        return [(tuple(ids), prompt) for ids, prompt in kept["answers"]]
    greedy = sampling.model_copy(
        update={"temperature": 0.0, "max_new_tokens": cap, "samples_per_problem": 1}
    )
    answers = _copying(model, tokenizer, prompts, greedy)
    write_text_atomic(path, json.dumps({**about, "answers": answers}))
    return answers


def _copying(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[tuple[int, ...]],
    greedy: SamplingSettings,
) -> list[TokenSequence]:
    """Answer batches of prompts until all are answered, or fewer than a tenth end in copies."""
    answers: list[TokenSequence] = []
    asked, seldom = 0, False
    while not seldom and asked < len(prompts):
        batch = [list(ids) for ids in prompts[asked : asked + greedy.batch_size]]
        keys = [str(asked + row) for row in range(len(batch))]
        asked += len(batch)
        generations = generate(model, tokenizer, batch, greedy, keys)
        for prompt, answer in zip(batch, generations, strict=True):
            # an answer that ended by itself has left its copies
            end = end_of_copies(answer.ids) if answer.finish_reason == "length" else None
            if end is not None:
                answers.append(((*prompt, *answer.ids[:end]), len(prompt)))
        # a model that seldom copies is not worth the sampling
        seldom = len(answers) < _LEAST * asked
    logger.info(
        f"{len(answers)} of {asked} greedy answers of the compressed model end in copies within "
        f"{greedy.max_new_tokens:,} tokens; recovery trains on "
        f"{'none of these' if seldom else 'these too'}"
    )
    return [] if seldom else answers
