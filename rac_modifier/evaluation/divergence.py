"""Divergence of a pruned model from the dense one, on the dense model's samples.

Both models read the same sequence (teacher forcing). At each completion token the dense model's
distribution p over the vocabulary is compared with the pruned model's, q:

    KL(p || q) = sum_v p_v (log p_v - log q_v)
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

from rac_modifier.errors import RacError
from rac_modifier.evaluation.intervals import mean_over_tokens
from rac_modifier.evaluation.teacher_forcing import (
    TokenSequence,
    batches_of_like_length,
    check_sequences,
    padded,
)
from rac_modifier.model_tools import evaluating

# Elements of the logits in a window and in a step of the comparison: 256 and 64 MiB in float32.
WINDOW_ELEMENTS = 1 << 26
_STEP_ELEMENTS = 1 << 24
BATCH_TOKENS = 4096  # most padded tokens of a batch; a longer sequence is a batch

# Per window of positions: the first position, the dense model's logits, the pruned model's.
Windows = Iterator[tuple[int, torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class TokenDivergence:
    """A completion: a value for each token."""

    kl: Sequence[float]  # KL(dense || pruned) in nats
    agrees: Sequence[bool]  # whether both models rank the same token first


@dataclass(frozen=True)
class PositionBin:
    """The completion tokens from position `start`, counted from 0, to before `end`."""

    start: int
    end: int
    sequences: int  # completions that are long enough to have tokens here
    tokens: int
    kl: float
    kl_stderr: float | None  # None with fewer than 16 such completions
    agreement: float
    agreement_stderr: float | None


@dataclass(frozen=True)
class DivergenceResult:
    """Divergence of a pruned model; compare it only with results on the same sequences.

    Standard errors treat completions, not tokens, as independent.
    """

    label: str
    sequences: int
    tokens: int  # of completions
    kl: float  # mean KL(dense || pruned) per completion token, in nats
    kl_stderr: float | None  # None with fewer than 16 sequences
    agreement: float  # share of tokens where both models rank the same token first
    agreement_stderr: float | None
    bins: tuple[PositionBin, ...]  # of equal width, up to the end of the longest completion
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return dataclasses.asdict(self)


def divergence(
    dense: Any,
    pruned: Any,
    sequences: Sequence[TokenSequence],
    *,
    label: str,
    bins: int = 16,
    progress: bool = True,
) -> DivergenceResult:
    """Measure KL(dense || pruned) per completion token and top-1 agreement.

    Memory next to the two models: a window of logits per model, the key-value caches of a batch
    of several windows, and about 256 MiB.

    Args:
        dense: a transformers causal LM.
        pruned: another causal LM with the same vocabulary, on any device.
        sequences: samples of the dense model (see `sample_sequences`).
        label: the result's name in tables.
        bins: the number of equally wide bins of positions.
        progress: show a progress bar.

    Raises:
        RacError: no sequences, a sequence without prompt or completion, a token id beyond a
            vocabulary, vocabularies of different sizes, or logits that are not finite.
    """
    started = time.monotonic()
    rows = divergence_per_token(dense, pruned, sequences, label=label, progress=progress)
    return summarise_divergence(rows, label=label, bins=bins, seconds=time.monotonic() - started)


@torch.no_grad()
def divergence_per_token(
    dense: Any,
    pruned: Any,
    sequences: Sequence[TokenSequence],
    *,
    label: str,
    progress: bool = True,
) -> list[TokenDivergence]:
    """Return the values of each completion, in the order of `sequences`; see `divergence`."""
    check_sequences(sequences)
    for role, model in (("dense", dense), ("pruned", pruned)):
        check_ids(role, model, sequences)
    rows: list[TokenDivergence] = []
    with (
        evaluating(dense, pruned),
        tqdm(
            total=len(sequences), desc=label, unit="sequence", disable=not progress or None
        ) as bar,
    ):
        for batch in batches_of_like_length(sequences, BATCH_TOKENS):
            rows += compare(batch, _both(dense, pruned, batch), label)
            bar.update(len(batch))
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i][0]))  # of the batches
    return [row for _, row in sorted(zip(order, rows, strict=True), key=lambda pair: pair[0])]


def token_divergence(p: torch.Tensor, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return KL(p || q), float64 [n] in nats, and top-1 agreement, bool [n], of logits [n, V]."""
    step = max(1, _STEP_ELEMENTS // p.shape[-1])
    kl, agrees = [], []
    for i in range(0, len(p), step):
        a, b = p[i : i + step], q[i : i + step].to(p.device)
        log_p, log_q = a.float().log_softmax(-1), b.float().log_softmax(-1)
        kl.append(
            F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1, dtype=torch.float64)
        )
        agrees.append(a.argmax(-1) == b.argmax(-1))
    return torch.cat(kl), torch.cat(agrees)


def _both(dense: Any, pruned: Any, batch: list[TokenSequence]) -> Windows:
    ids = padded(batch)[0][:, :-1]
    width = max(1, WINDOW_ELEMENTS // (len(batch) * vocabulary(dense)))
    for (start, p), (_, q) in zip(
        windows(dense, ids, width), windows(pruned, ids, width), strict=True
    ):
        yield start, p, q


def compare(batch: list[TokenSequence], logits: Windows, label: str) -> list[TokenDivergence]:
    """Return the divergence at every completion token of a batch, a row per sequence.

    Raises:
        RacError: vocabularies of different sizes, or logits that are not finite.
    """
    predicts = padded(batch)[1][:, 1:]  # the logits at a position predict the next token
    kl = torch.zeros(predicts.shape, dtype=torch.float64)
    agrees = torch.zeros(predicts.shape, dtype=torch.bool)
    for start, p, q in logits:
        if p.shape[-1] != q.shape[-1]:
            raise RacError(
                f"{label}: a vocabulary of {q.shape[-1]} tokens, the dense model has "
                f"{p.shape[-1]}; compare a pruned model with the model that it was made from"
            )
        window = slice(start, start + p.shape[1])
        mask = predicts[:, window]
        if not mask.any():
            continue
        values = token_divergence(p[mask.to(p.device)], q[mask.to(q.device)])
        kl[:, window][mask], agrees[:, window][mask] = (value.cpu() for value in values)
    if not kl.isfinite().all():
        raise RacError(
            f"{label}: the logits of the dense model or of this model are not finite on these "
            "sequences; load both in float32, and check the checkpoint"
        )
    return [
        TokenDivergence(k[mask].tolist(), a[mask].tolist())
        for k, a, mask in zip(kl, agrees, predicts, strict=True)
    ]


def windows(model: Any, ids: torch.Tensor, width: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield windows of positions: the first position, and logits [rows, up to width, vocabulary].

    The key-value cache carries the context from window to window; a batch of a single window is
    an ordinary forward pass.
    """
    cache = None
    several = ids.shape[1] > width
    for start in range(0, ids.shape[1], width):
        output = model(
            input_ids=ids[:, start : start + width].to(model.device),
            past_key_values=cache,
            use_cache=several,
        )
        cache = output.past_key_values
        yield start, output.logits


def vocabulary(model: Any) -> int:
    """Count the tokens of the model's input embedding."""
    return model.get_input_embeddings().num_embeddings


def check_ids(role: str, model: Any, sequences: Sequence[TokenSequence]) -> None:
    """Check that token ids are within the model's vocabulary.

    Raises:
        RacError: one is not.
    """
    largest, size = max(max(ids) for ids, _ in sequences), vocabulary(model)
    if largest >= size:
        raise RacError(
            f"the sequences hold token id {largest}, beyond the vocabulary of the {role} model "
            f"({size} tokens); give sequences that the dense model wrote, and a model pruned from "
            "it"
        )


def summarise_divergence(
    rows: Sequence[TokenDivergence], *, label: str, bins: int = 16, seconds: float
) -> DivergenceResult:
    """Summarise completions, none of them empty, measured in `seconds`."""
    assert rows, "a measurement without sequences is refused earlier"
    kl, kl_stderr = mean_over_tokens([row.kl for row in rows])
    agreement, agreement_stderr = mean_over_tokens([row.agrees for row in rows])
    longest = max(len(row.kl) for row in rows)
    width = math.ceil(longest / bins)
    return DivergenceResult(
        label=label,
        sequences=len(rows),
        tokens=sum(len(row.kl) for row in rows),
        kl=kl,
        kl_stderr=kl_stderr,
        agreement=agreement,
        agreement_stderr=agreement_stderr,
        bins=tuple(_bin(rows, start, start + width) for start in range(0, longest, width)),
        seconds=seconds,
    )


def _bin(rows: Sequence[TokenDivergence], start: int, end: int) -> PositionBin:
    reaching = [row for row in rows if len(row.kl) > start]
    kl = mean_over_tokens([row.kl[start:end] for row in reaching])
    agreement = mean_over_tokens([row.agrees[start:end] for row in reaching])
    tokens = sum(len(row.kl[start:end]) for row in reaching)
    return PositionBin(start, end, len(reaching), tokens, *kl, *agreement)
