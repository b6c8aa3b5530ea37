"""Divergence of a pruned model from the dense one, on the dense model's samples.

Both models read the same sequence (teacher forcing). At each completion token the dense model's
distribution p over the vocabulary is compared with the pruned model's, q:

    KL(p || q) = sum_v p_v (log p_v - log q_v)
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Self

import torch
import torch.nn.functional as F
from loguru import logger
from torch import Tensor

from rac_modifier.errors import RacError
from rac_modifier.measure.intervals import mean_over_tokens
from rac_modifier.measure.teacher_forcing import (
    TokenSequence,
    batches_of_like_length,
    check_sequences,
    input_of_head,
    output_head,
    padded,
    vocabulary,
)
from rac_modifier.runtime.models import evaluating
from rac_modifier.runtime.progress import Phase

# Elements of the logits in a window and in a step of the comparison: 256 and 64 MiB in float32.
WINDOW_ELEMENTS = 1 << 26
_STEP_ELEMENTS = 1 << 24
BATCH_TOKENS = 4096  # most padded tokens of a batch; a longer sequence is a batch

# Per window of positions: the first position, the dense model's logits, the pruned model's.
Windows = Iterator[tuple[int, Tensor, Tensor]]


@dataclass(frozen=True)
class TokenDivergence:
    """A completion: a value for each token."""

    kl: Sequence[float]  # KL(dense || pruned) in nats
    agrees: Sequence[bool]  # whether both models rank the same token first


@dataclass(frozen=True)
class DivergenceResult:
    """Divergence of a pruned model; compare it only with results on the same sequences."""

    label: str
    sequences: int
    tokens: int  # of completions
    kl: float  # mean KL(dense || pruned) per completion token, in nats
    kl_stderr: float | None  # None with fewer than 16 sequences
    agreement: float  # share of tokens where both models rank the same token first
    agreement_stderr: float | None

    @classmethod
    def of(cls, rows: Sequence[TokenDivergence], label: str) -> Self:
        """Summarise completions, none of them empty."""
        kl, kl_stderr = mean_over_tokens([row.kl for row in rows])
        agreement, agreement_stderr = mean_over_tokens([row.agrees for row in rows])
        tokens = sum(len(row.kl) for row in rows)
        return cls(label, len(rows), tokens, kl, kl_stderr, agreement, agreement_stderr)


def token_divergence(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
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


def _compare(batch: list[TokenSequence], logits: Windows, label: str) -> list[TokenDivergence]:
    """Return the divergence at every completion token of a batch, a row per sequence."""
    predicts = padded(batch)[1][:, 1:]  # the logits at a position predict the next token
    kl = torch.zeros(predicts.shape, dtype=torch.float64)
    agrees = torch.zeros(predicts.shape, dtype=torch.bool)
    for start, p, q in logits:
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


class DenseReference:
    """Inputs of a dense model's output head on its samples, [tokens, d], on the CPU.

    Logits would take gigabytes. The dense model is not needed any more, so it may be compressed in
    place. A copy of its head, V x d values, is kept. Logits of both models leave the head in one
    batch, so that scales and soft caps of logits apply to both.
    """

    @torch.no_grad()
    def __init__(self, model: Any, sequences: Sequence[TokenSequence]):
        """Run the dense model up to its head (RacError: it has none, or unfit sequences)."""
        check_sequences(sequences, model)
        self._sequences, self._vocabulary = sequences, vocabulary(model)
        self._batches = list(batches_of_like_length(sequences, BATCH_TOKENS))
        self._entering = []
        title = "the dense model on held-out traces"
        with evaluating(model), Phase(title, len(self._batches), unit="batches") as phase:
            for batch in self._batches:
                self._entering.append(input_of_head(model, padded(batch)[0][:, :-1]).cpu())
                phase.advance()
        head = output_head(model)
        self._weight: Tensor = head.weight.detach().to("cpu", copy=True)
        bias = getattr(head, "bias", None)
        self._bias = None if bias is None else bias.detach().to("cpu", copy=True)

    def divergence(self, pruned: Any, *, label: str) -> DivergenceResult:
        """Measure KL(dense || pruned) per completion token, and top-1 agreement.

        Memory next to the model: a window of logits of both models, and its key-value cache.
        RacError: another vocabulary, or logits that are not finite.
        """
        return DivergenceResult.of(self.divergence_per_token(pruned, label), label)

    @torch.no_grad()
    def divergence_per_token(self, pruned: Any, label: str) -> list[TokenDivergence]:
        """Return the values of each completion, in the order of the sequences."""
        if vocabulary(pruned) != self._vocabulary:
            raise RacError(
                f"{label}: a vocabulary of {vocabulary(pruned)} tokens, the dense model has "
                f"{self._vocabulary}; compare a pruned model with the model that it was made from"
            )
        weight = self._weight.to(pruned.device)
        bias = None if self._bias is None else self._bias.to(pruned.device)
        dense_head = partial(F.linear, weight=weight, bias=bias)
        rows: list[TokenDivergence] = []
        title = f"divergence, {label}"
        with evaluating(pruned), Phase(title, len(self._batches), unit="batches") as phase:
            for batch, entering in zip(self._batches, self._entering, strict=True):
                rows += _compare(batch, _windows(pruned, dense_head, batch, entering), label)
                phase.advance()
        order = sorted(range(len(rows)), key=lambda i: len(self._sequences[i][0]))
        return [row for _, row in sorted(zip(order, rows, strict=True), key=lambda pair: pair[0])]


def _windows(
    pruned: Any,
    dense_head: Callable[[Tensor], Tensor],
    batch: list[TokenSequence],
    entering: Tensor,
) -> Windows:
    """Yield windows of logits of the dense model, by its input of the head, and of the pruned."""
    ids, start = padded(batch)[0][:, :-1].to(pruned.device), 0
    cache: Any = None
    width = max(1, WINDOW_ELEMENTS // (2 * len(batch) * vocabulary(pruned)))

    def append_dense(module: Any, args: Any, logits: Tensor) -> Tensor:
        # a slice would be multiplied as a batch, in bfloat16 17 times as slowly
        entered = entering[:, start : start + width].contiguous()
        dense = dense_head(entered.to(logits.device))
        return torch.cat([dense.float(), logits.float()])

    hook = output_head(pruned).register_forward_hook(append_dense)
    try:
        for start in range(0, ids.shape[1], width):
            window, several = ids[:, start : start + width], ids.shape[1] > width
            output = pruned(input_ids=window, past_key_values=cache, use_cache=several)
            cache = getattr(output, "past_key_values", None)  # state-space models have none
            if several and cache is None:
                raise RacError(
                    f"{type(pruned).__name__} keeps no key-value cache, so sequences of more than "
                    f"{width:,} tokens cannot be compared; give shorter ones"
                )
            of_dense, of_pruned = output.logits.chunk(2)
            yield start, of_dense, of_pruned
    finally:
        hook.remove()


class RunDivergence:
    """KL and top-1 agreement on held-out traces, or the reason why they are not measured."""

    def __init__(self, model: Any, held_out: Sequence[TokenSequence], *, off_policy: bool):
        """Run the dense model over these traces, unless another model wrote them (`off_policy`)."""
        self._reference: DenseReference | str
        if not held_out:
            self._reference = (
                "no traces were held out (calibration.held_out_tokens, or a mixture without traces)"
            )
        elif off_policy:
            self._reference = "the traces may be another model's (traces.allow_off_policy)"
        else:
            try:
                self._reference = DenseReference(model, held_out)
            except RacError as error:
                self._reference = str(error)
        if isinstance(self._reference, str):
            logger.info(f"divergence from the dense model will not be measured: {self._reference}")

    def measure(self, model: Any) -> dict[str, Any]:
        """Return the entry of the run record; a failure is recorded and does not stop the run."""
        if isinstance(self._reference, str):
            return {"not_measured": self._reference}
        try:
            result = self._reference.divergence(model, label="pruned")
        except (RacError, RuntimeError) as error:
            logger.warning(f"divergence from the dense model was not measured: {error}")
            return {"not_measured": str(error)}
        logger.info(
            f"divergence from the dense model on {result.tokens:,} held-out tokens of its own: "
            f"KL {result.kl:.4f} nats per token, top-1 agreement {result.agreement:.1%}"
        )
        record = asdict(result)
        del record["label"]
        return record
