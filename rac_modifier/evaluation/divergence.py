"""Divergence of a pruned from the dense model on the dense model's own samples: a measure that needs no labels.

Both models read the same sequence (teacher forcing); at each completion token the dense model's distribution over the
vocabulary, p, is compared with the pruned one's, q: KL(p || q) = sum_v p_v (log p_v - log q_v).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from rac_modifier.errors import RacError
from rac_modifier.evaluation.divergence_result import DivergenceResult, TokenDivergence, summarise_divergence
from rac_modifier.evaluation.teacher_forcing import TokenSequence, batches_of_like_length, check_sequences, padded
from rac_modifier.model_tools import evaluating

# Logits of one window and of one step of the comparison, in elements: 256 MiB and 64 MiB in float32.
WINDOW_ELEMENTS = 1 << 26
_STEP_ELEMENTS = 1 << 24


@torch.no_grad()
def divergence(
    dense: Any,
    pruned: Any,
    sequences: Sequence[TokenSequence],
    *,
    label: str,
    bins: int = 16,
    batch_tokens: int = 4096,
    window_elements: int = WINDOW_ELEMENTS,
    progress: bool = True,
) -> DivergenceResult:
    """Mean KL(dense || pruned) in nats a completion token, and top-1 agreement; in total and by position.

    Memory beside the two models: a window of logits each (`window_elements`, more only where a single position of the
    batch has more), the key-value caches of a batch where it takes more than one window, and about 256 MiB.

    Args:
        dense: a transformers causal LM.
        pruned: another with the same vocabulary, on any device.
        sequences: samples of the dense model, as token ids and the length of their prompt (see `own_samples`).
        label: the result's name in tables.
        bins: positions are reported in this many bins of equal width.
        batch_tokens: padded tokens of a batch at most; a longer sequence makes a batch of its own.
        window_elements: logits of a model held at once (rows x positions x vocabulary).
        progress: show a progress bar.

    Raises:
        RacError: no sequences, one without a prompt or completion, token ids that a model does not have, vocabularies of
            different sizes, logits that are not finite, a setting below 1.
    """
    for name, value in (("bins", bins), ("batch_tokens", batch_tokens), ("window_elements", window_elements)):
        if value < 1:
            raise RacError(f"{name}={value}: must be at least 1; leave it out for the usual {name}")
    check_sequences(sequences)
    for role, model in (("dense", dense), ("pruned", pruned)):
        check_ids(role, model, sequences)
    rows: list[TokenDivergence] = []
    started = time.monotonic()
    with evaluating(dense, pruned):
        for batch in _with_progress(sequences, batch_tokens, label if progress else None):
            rows += compare(batch, _both(dense, pruned, batch, window_elements), label)
    return summarise_divergence(rows, label=label, bins=bins, seconds=time.monotonic() - started)


def token_divergence(p: torch.Tensor, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(p || q) float64 [n] in nats and top-1 agreement bool [n] of two sets of logits [n, vocabulary]."""
    step = max(1, _STEP_ELEMENTS // p.shape[-1])
    kl, agrees = [], []
    for i in range(0, len(p), step):
        a, b = p[i : i + step], q[i : i + step].to(p.device)
        log_p, log_q = a.float().log_softmax(-1), b.float().log_softmax(-1)
        kl.append(F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1, dtype=torch.float64))
        agrees.append(a.argmax(-1) == b.argmax(-1))
    return torch.cat(kl), torch.cat(agrees)


Windows = Iterator[tuple[int, torch.Tensor, torch.Tensor]]


def _both(dense: Any, pruned: Any, batch: list[TokenSequence], window_elements: int) -> Windows:
    """The logits of both models, window by window, with the position that each window starts at."""
    ids = padded(batch)[0][:, :-1]
    width = max(1, window_elements // (len(batch) * vocabulary(dense)))
    for (start, p), (_, q) in zip(windows(dense, ids, width), windows(pruned, ids, width), strict=True):
        yield start, p, q


def compare(batch: list[TokenSequence], logits: Windows, label: str) -> list[TokenDivergence]:
    """The divergence at every completion token of a batch, a row a sequence; `logits` are the dense and the pruned model's.

    Raises:
        RacError: vocabularies of different sizes, or logits that are not finite.
    """
    predicts = padded(batch)[1][:, 1:]  # the logits at a position are about the next token
    kl = torch.zeros(predicts.shape, dtype=torch.float64)
    agrees = torch.zeros(predicts.shape, dtype=torch.bool)
    for start, p, q in logits:
        if p.shape[-1] != q.shape[-1]:
            raise RacError(
                f"{label}: a vocabulary of {q.shape[-1]} tokens, the dense model has {p.shape[-1]}; compare a pruned "
                "model with the model that it was made from"
            )
        window = slice(start, start + p.shape[1])
        wanted = predicts[:, window]
        if not wanted.any():
            continue
        found = token_divergence(p[wanted.to(p.device)], q[wanted.to(q.device)])
        kl[:, window][wanted], agrees[:, window][wanted] = (values.cpu() for values in found)
    if not kl.isfinite().all():
        raise RacError(
            f"{label}: the logits of the dense or of this model are not finite on the given sequences; load both in "
            "float32, and check the checkpoint"
        )
    return [
        TokenDivergence(k[mask].tolist(), a[mask].tolist()) for k, a, mask in zip(kl, agrees, predicts, strict=True)
    ]


def windows(model: Any, ids: torch.Tensor, width: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Logits [rows, up to width, vocabulary] of successive windows of positions, with the position each starts at.

    Windows bound the logits, which at 152k tokens in the vocabulary are larger than all other activations together. The
    key-value cache carries the context over; what fits one window is an ordinary forward pass.
    """
    cache = None
    several = ids.shape[1] > width
    for start in range(0, ids.shape[1], width):
        output = model(
            input_ids=ids[:, start : start + width].to(model.device), past_key_values=cache, use_cache=several
        )
        cache = output.past_key_values
        yield start, output.logits


def vocabulary(model: Any) -> int:
    """Tokens that the model's embedding knows."""
    return model.get_input_embeddings().num_embeddings


def check_ids(role: str, model: Any, sequences: Sequence[TokenSequence]) -> None:
    """Refuse sequences with ids beyond the model's vocabulary (RacError)."""
    largest, size = max(max(ids) for ids, _ in sequences), vocabulary(model)
    if largest >= size:
        raise RacError(
            f"the sequences hold token id {largest}, beyond the vocabulary of the {role} model ({size} tokens); give "
            "sequences that the dense model wrote, and a model pruned from it"
        )


def _with_progress(
    sequences: Sequence[TokenSequence], batch_tokens: int, label: str | None
) -> Iterator[list[TokenSequence]]:
    from tqdm import tqdm

    with tqdm(total=len(sequences), desc=label, unit="sequence", disable=label is None) as bar:
        for batch in batches_of_like_length(sequences, batch_tokens):
            yield batch
            bar.update(len(batch))
