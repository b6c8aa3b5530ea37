"""Sequences of prompt and completion: checked, batched, padded, and read by a model."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rac_modifier.errors import RacError
from rac_modifier.runtime.models import input_of

S = TypeVar("S")
# Token ids, and the length of the prompt.
TokenSequence = tuple[Sequence[int], int]


def _length(sequence: Any) -> int:
    return len(sequence[0])


def batches_of_like_length(
    sequences: Iterable[S],
    most_tokens: int,
    length: Callable[[S], int] = _length,
    most_padding: float = math.inf,
) -> Iterator[list[S]]:
    """Yield batches of at most `most_tokens` padded tokens, shortest sequences first.

    A longer sequence is a batch. None adds more than `most_padding` tokens to the sequences before.
    """
    batch: list[S] = []
    for sequence in sorted(sequences, key=length):
        size = length(sequence)
        padding = len(batch) * (size - length(batch[-1])) if batch else 0
        if batch and ((len(batch) + 1) * size > most_tokens or padding > most_padding):
            yield batch
            batch = []
        batch.append(sequence)
    if batch:
        yield batch


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
