"""Sequences of prompt and completion: sampled from a model, checked, batched, padded."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from rac_modifier.calibration import loader
from rac_modifier.errors import RacError
from rac_modifier.problems.source import Problem
from rac_modifier.runtime.models import input_of
from rac_modifier.sampling.generate import generate
from rac_modifier.sampling.prompts import render_question
from rac_modifier.settings.sampling import SamplingSettings
from rac_modifier.traces.records import Trace

# Token ids, and the length of the prompt.
TokenSequence = tuple[Sequence[int], int]
batches_of_like_length = partial(loader.batches_of_like_length, length=lambda s: len(s[0]))


def sequence_of(trace: Trace) -> TokenSequence:
    """Return the prompt and completion of a stored trace."""
    return (*trace.prompt_ids, *trace.completion_ids), len(trace.prompt_ids)


def sample_sequences(
    model: Any, tokenizer: Any, problems: Sequence[Problem], sampling: SamplingSettings
) -> list[TokenSequence]:
    """Complete each problem `samples_per_problem` times, as traces are sampled."""
    requests = [
        (f"{p.id}#{i}", p.question) for p in problems for i in range(sampling.samples_per_problem)
    ]
    size = sampling.batch_size
    batches = [requests[i : i + size] for i in range(0, len(requests), size)]
    sequences: list[TokenSequence] = []
    for batch in tqdm(batches, desc="samples", unit="batch", disable=None):
        prompts = [render_question(tokenizer, question, sampling) for _, question in batch]
        generations = generate(model, tokenizer, prompts, sampling, [key for key, _ in batch])
        sequences.extend(((*p, *g.ids), len(p)) for p, g in zip(prompts, generations, strict=True))
    return sequences


def vocabulary(model: Any) -> int:
    """Count the tokens of the model's input embedding."""
    return model.get_input_embeddings().num_embeddings


def check_sequences(sequences: Sequence[TokenSequence], *models: Any) -> None:
    """Refuse no sequences, and one without a prompt or completion in each model's vocabulary."""
    if not sequences:
        raise RacError("no sequences to measure on; give at least one")
    for ids, prompt_length in sequences:
        if not 1 <= prompt_length < len(ids):
            raise RacError(
                f"prompt_length {prompt_length} of a sequence of {len(ids)} tokens leaves no "
                "prompt or no completion; give sequences with at least one token of each"
            )
    largest = max(max(ids) for ids, _ in sequences)
    for model in models:
        if largest >= vocabulary(model):
            raise RacError(
                f"token id {largest} is beyond a model's vocabulary of {vocabulary(model)}; give "
                "sequences that the dense model wrote, and a model pruned from it"
            )


def padded(batch: Sequence[TokenSequence]) -> tuple[Tensor, Tensor]:
    """Return ids, int64 [rows, length], padded with 0 on the right, and the completion mask."""
    rows = [torch.tensor(ids) for ids, _ in batch]
    completions = [torch.arange(len(ids)) >= prompt_length for ids, prompt_length in batch]
    return pad_sequence(rows, batch_first=True), pad_sequence(completions, batch_first=True)


def output_head(model: Any) -> Any:
    """Return the output embeddings of a causal LM (RacError: it has none)."""
    head = model.get_output_embeddings()
    if head is None:
        raise RacError(f"{type(model).__name__} has no output embeddings to compare")
    return head


def input_of_head(model: Any, ids: Tensor) -> Tensor:
    """Return the input of the output head, [rows, tokens, d], for `ids` [rows, tokens]."""
    head, ids = output_head(model), ids.to(model.device)
    states = input_of(head, lambda: model(input_ids=ids, use_cache=False))
    if states is None:
        raise RacError(f"{type(model).__name__} does not call its output embeddings")
    return states
