"""What a rounded output head costs: KL and top-1 agreement with the unrounded head, on the model's own sequences.

The head of a served model is rounded by RAC_LM_HEAD while it is loaded. Here the same function rounds it, and both heads read
the same hidden states. Their products are in float32, so that the result is the rounding's alone.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from rac_modifier.checkpoint.bitmask import row_chunks
from rac_modifier.checkpoint.round_to_nearest import HEAD_BITS, relative_error, round_head
from rac_modifier.checkpoint.stored_weight import FLOATS, dequantize
from rac_modifier.errors import RacError
from rac_modifier.evaluation.dense_reference import output_head
from rac_modifier.evaluation.divergence import (
    WINDOW_ELEMENTS,
    DivergenceResult,
    Windows,
    check_ids,
    compare,
    summarise_divergence,
    vocabulary,
    windows,
)
from rac_modifier.evaluation.report import ResultTable, check_same_sequences
from rac_modifier.evaluation.teacher_forcing import (
    TokenSequence,
    batches_of_like_length,
    check_sequences,
    padded,
)
from rac_modifier.model_tools import evaluating


@dataclass(frozen=True)
class RoundedHead:
    """A head [rows, columns] rounded to `bits`, and what that changes.

    nbytes: of its values and scales. unrounded_bytes: as it is stored. weight_error: ||W - Q|| / ||W||. divergence: from the
    unrounded head; its `kl` is in nats per token.
    """

    bits: int
    rows: int
    columns: int
    nbytes: int
    unrounded_bytes: int
    weight_error: float
    divergence: DivergenceResult

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**vars(self), "divergence": self.divergence.as_dict()}


@torch.no_grad()
def measure_rounded_head(
    model: Any,
    sequences: Sequence[TokenSequence],
    bits: int,
    *,
    bins: int = 8,
    batch_tokens: int = 4096,
    window_elements: int = WINDOW_ELEMENTS,
    progress: bool = True,
) -> RoundedHead:
    """Round the head of a transformers causal LM to 8 or 4 bits and compare it with the unrounded one; one forward pass.

    `sequences`: samples of this model, as token ids and the length of the prompt (see `own_samples`). The other arguments are
    those of `divergence`. The model is left as it was.

    Raises:
        RacError: other bits, a head without float weights or without groups for int4, sequences that `divergence` refuses.
    """
    if bits not in HEAD_BITS:
        raise RacError(f"bits={bits}: a head can be rounded to 8 or 4 bits")
    head = output_head(model)
    weight = getattr(head, "weight", None)
    if (
        weight is None
        or weight.dtype not in FLOATS
        or getattr(head, "quantization_scheme", None) is not None
    ):
        raise RacError(
            f"the head of this {type(model).__name__} is quantized already; RAC_LM_HEAD rounds heads of float weights only"
        )
    check_sequences(sequences)
    check_ids("dense", model, sequences)
    started = time.monotonic()
    weight, bias_of_head = weight.detach(), getattr(head, "bias", None)
    on_cpu = weight.cpu()
    values, scale = round_head(on_cpu, bits)
    label = f"int{bits} head"

    def both(module: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = args[0].float()
        logits = [torch.empty(*x.shape[:-1], len(weight), device=x.device) for _ in range(2)]
        for part in row_chunks(*weight.shape):
            rounded = dequantize(values[part], scale[part], torch.float32).to(x.device)
            bias = None if bias_of_head is None else bias_of_head[part].float()
            for of, rows in zip(logits, (weight[part].float(), rounded), strict=True):
                of[..., part] = F.linear(x, rows, bias)
        return torch.cat(logits)

    hook = head.register_forward_hook(both)
    rows = []
    try:
        with (
            evaluating(model),
            tqdm(
                total=len(sequences),
                desc=label,
                unit="sequence",
                disable=None if progress else True,
            ) as bar,
        ):
            for batch in batches_of_like_length(sequences, batch_tokens):
                rows += compare(batch, _halves(model, batch, window_elements), label)
                bar.update(len(batch))
    finally:
        hook.remove()
    return RoundedHead(
        bits,
        len(weight),
        weight.shape[1],
        values.numel() * bits // 8 + scale.numel() * (4 if bits == 8 else 2),
        weight.nbytes,
        relative_error(on_cpu, values, scale),
        summarise_divergence(rows, label=label, bins=bins, seconds=time.monotonic() - started),
    )


def rounded_head_table(found: Sequence[RoundedHead]) -> ResultTable:
    """A row per rounded head, with its bytes and its divergence, each mean with its standard error.

    Raises:
        RacError: none, or results on different sequences.
    """
    check_same_sequences([each.divergence for each in found])
    first = found[0]
    rows = []
    for each in found:
        kl, agreement = each.divergence.kl, each.divergence.agreement
        errors = each.divergence.kl_stderr, each.divergence.agreement_stderr
        rows.append(
            (
                f"int{each.bits}",
                f"{each.nbytes / 1e6:.1f}",
                f"{each.weight_error:.1%}",
                f"{kl:.1e}" + ("" if errors[0] is None else f" ± {errors[0]:.1e}"),
                f"{agreement:.2%}" + ("" if errors[1] is None else f" ± {errors[1]:.2%}"),
            )
        )
    return ResultTable(
        head=("head", "MB", "change of weights", "KL, nats per token", "top-1 agreement"),
        rows=tuple(rows),
        note=f"KL(unrounded || rounded) of the head [{first.rows}, {first.columns}], {first.unrounded_bytes / 1e6:.1f} MB as "
        f"stored, on {first.divergence.tokens:,} completion tokens of {first.divergence.sequences:,} sequences; ± one "
        "standard error over sequences.",
    )


def _halves(model: Any, batch: list[TokenSequence], window_elements: int) -> Windows:
    """The logits of the unrounded and of the rounded head, which the hook has put one after the other."""
    ids = padded(batch)[0][:, :-1]
    width = max(1, window_elements // (2 * len(batch) * vocabulary(model)))
    for start, logits in windows(model, ids, width):
        plain, rounded = logits.chunk(2)
        yield start, plain, rounded
