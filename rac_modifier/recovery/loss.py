"""Hidden states that predict completion tokens, and KL(dense || student) of their predictions.

For a completion token with dense logits t and student logits s, p = softmax(t), q = softmax(s):

    KL = sum_v p_v (log p_v - log q_v)        dKL/ds = q - p        dKL/dh = (q - p) W_head

Both models have the same frozen head, so only the gradient of the student's hidden state h is
needed. It is computed with the loss, in chunks of tokens: logits of 2,048 tokens would be 1.2 GB at
a vocabulary of 150,000. A CPU takes fewer tokens per softmax, so that they stay in its cache.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rac_modifier.errors import RacError
from rac_modifier.measure.repeats import loop_at_end
from rac_modifier.measure.teacher_forcing import TokenSequence, input_of_head, padded
from rac_modifier.measure.teacher_forcing import output_head as any_head
from rac_modifier.runtime.cpu_tuning import matmul

_COPY = math.log(0.1)  # added to the dense model's logit of a copied token
_CHUNK_ELEMENTS = 1 << 25  # logits of a model held in memory
_CACHED_ELEMENTS = 1 << 19  # of these in float32 per softmax on a CPU: 2 MiB


def output_head(model: Any) -> torch.nn.Module:
    """Return the output embeddings of a causal LM (RacError: no linear layer without a bias)."""
    head = any_head(model)
    if not isinstance(head, torch.nn.Linear) or head.bias is not None:
        raise RacError(
            f"{type(model).__name__} has no plain linear output head, so its predictions cannot be "
            "recovered from hidden states"
        )
    return head


def predicting_states(model: Any, batch: Sequence[TokenSequence]) -> Tensor:
    """Return hidden states [completion tokens, d] of a batch, row by row, with their gradient."""
    ids, completion = padded(batch)
    states = input_of_head(model, ids[:, :-1])
    return states[completion[:, 1:].to(states.device)]  # a position predicts the next token


@torch.no_grad()
def check_head(model: Any, sequence: TokenSequence) -> None:
    """Refuse logits that are not finite, or not the output of the model's head (RacError)."""
    head, ids = output_head(model), torch.tensor([list(sequence[0][:-1])], device=model.device)
    predicted = head(predicting_states(model, [sequence])[-1:]).float()
    expected = model(input_ids=ids, use_cache=False).logits[:, -1].float()
    if not bool(expected.isfinite().all()):
        raise RacError(
            f"{type(model).__name__} computes logits that are not finite, so recovery cannot "
            "measure it; load it with --precision float32, or leave recover out"
        )
    if not torch.allclose(predicted, expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max())):
        raise RacError(
            f"{type(model).__name__} changes its logits after the output head (a soft cap or a "
            "scale), which recovery does not support; leave recover out"
        )


def targets(batch: Sequence[TokenSequence]) -> tuple[Tensor, Tensor]:
    """Return, by completion token of a batch, the row of its target and the token that it copies.

    A token's target is the dense model's prediction at its own place. Where a completion ends in
    copies, from the third copy on it is the prediction at the same place of the first, so that
    copies are no reason for another. A second copy may be meant. All other tokens have -1.
    """
    rows: list[int] = []
    copied: list[int] = []
    for ids, prompt in batch:
        completion, first = ids[prompt:], len(rows)
        begin, period = loop_at_end(completion) or (len(completion), 1)
        for place, token in enumerate(completion):
            # the first two copies keep their own targets
            copies = place >= begin + 2 * period
            rows.append(first + (begin + (place - begin) % period if copies else place))
            copied.append(token if copies else -1)
    return torch.tensor(rows), torch.tensor(copied)


def head_kl(
    hidden: Tensor, dense_hidden: Tensor, head: torch.nn.Module, copied: Tensor | None = None
) -> Tensor:
    """Return the sum over tokens of KL(dense || student), in nats, with a gradient for `hidden`.

    `hidden` and `dense_hidden`, on any device, are inputs [tokens, d] of the `head` of both. The
    dense model's odds of a `copied` token, an id or -1, are a tenth.
    """
    return _HeadKL.apply(hidden, dense_hidden, head, copied)


class _HeadKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, dense_hidden: Tensor, head: Any, copied: Tensor | None
    ) -> Tensor:
        weight = head.weight
        step = max(1, _CHUNK_ELEMENTS // weight.shape[0])
        trained = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if trained else None
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for start in range(0, len(hidden), step):
            part = slice(start, start + step)
            dense = matmul(dense_hidden[part].to(weight), weight.T)  # t = h_d W^T
            if copied is not None:
                places = (copied[part] >= 0).nonzero()[:, 0].to(dense.device)
                dense[places, copied[part].to(dense.device)[places]] += _COPY
            student = matmul(hidden[part].to(weight.dtype), weight.T)  # s = h W^T
            total += _kl_(student, dense, trained)
            if gradient is not None:
                # dKL/dh = (q - p) W; the logits are not kept for the backward pass
                gradient[part] = matmul(student, weight).to(gradient.dtype)
        ctx.save_for_backward(gradient)
        return total.float()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outer[0], None, None, None


def _kl_(student: Tensor, dense: Tensor, trained: bool) -> Tensor:
    """Return the sum over tokens of the KL of logits [tokens, vocabulary], float64.

    KL = sum_v p_v (t_v - s_v) - lse(t) + lse(s), with lse the largest logit less the logarithm of
    its probability. Both are overwritten; with `trained`, `student` becomes the gradient q - p.
    """
    rows = len(student)
    if student.device.type == "cpu":
        rows = max(1, _CACHED_ELEMENTS // student.shape[1])
    total = torch.zeros((), dtype=torch.float64, device=student.device)
    for student_rows, dense_rows in zip(student.split(rows), dense.split(rows), strict=True):
        s, t = student_rows.float(), dense_rows.float()
        q, p = s.softmax(-1), t.softmax(-1)
        # lse(t) - lse(s): max(p) = exp(max(t) - lse(t)), so no second pass over the vocabulary
        sums = (t.amax(-1) - p.amax(-1).log()) - (s.amax(-1) - q.amax(-1).log())
        # sum_v p_v (t_v - s_v) - lse(t) + lse(s)
        total += (torch.linalg.vecdot(p, t.sub_(s)) - sums).sum(dtype=torch.float64)
        if trained:
            student_rows.copy_(q.sub_(p))
    return total
