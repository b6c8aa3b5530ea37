"""An lm_head and an embedding of int8 or int4 on request: unpruned, a head is a large part of what a decode step reads.

RAC_LM_HEAD=int8 rounds each row of the head to 255 levels while it is loaded, and multiplies it on an int8 kernel without
masks: one byte per weight. RAC_LM_HEAD=int4 rounds groups of 128 columns (or 64, or 32) to 16 levels: 0.52 bytes per weight.
The log has the error of the weights, and `rac head` measures what it does to predictions. RAC_EMBEDDING rounds the embedding
in the same way, which saves memory, not time. One that is tied to the head shares its copy; else it stays as it is.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import NoReturn

import torch
from torch import Tensor
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from rac_modifier.checkpoint.round_to_nearest import head_group, relative_error, round_head
from rac_modifier.checkpoint.stored_weight import all_stored
from rac_modifier.errors import RacError
from rac_modifier.kernels.choose import choose
from rac_modifier.kernels.interface import Layer, stay_dense
from rac_modifier.vllm_plugin.vocabulary import VocabularyMethod, logger

VARIABLE, EMBEDDING = "RAC_LM_HEAD", "RAC_EMBEDDING"


def wanted_bits(variable: str = VARIABLE) -> int | None:
    """Bits of the head, or of the embedding, that the environment requests; None where it requests nothing.

    Raises:
        RacError: it requests something else.
    """
    wanted = os.environ.get(variable) or None
    if wanted not in (None, "int8", "int4"):
        what = "head" if variable == VARIABLE else "embedding"
        raise RacError(
            f'{variable}="{wanted}": the {what} can be int8 or int4; unset it to leave the {what} as it is stored'
        )
    return None if wanted is None else int(wanted[3:])


class RoundedMethod(VocabularyMethod):
    """Loads a head or an embedding as vLLM does, then keeps it in 8 or 4 bits. Where there is no kernel it stays as it is."""

    def __init__(self, variable: str, bits: int) -> None:
        super().__init__()
        self.variable, self.bits = variable, bits

    def tie_weights(self, layer: torch.nn.Module, embed_tokens: torch.nn.Module) -> torch.nn.Module:
        """Tie the head to the embedding.

        Raises:
            RacError: both are rounded, to different widths.
        """
        method = getattr(embed_tokens, "quant_method", None)
        if isinstance(method, RoundedMethod) and method.bits != self.bits:
            raise RacError(
                f"{EMBEDDING}=int{method.bits} and {VARIABLE}=int{self.bits}: this model's head and embedding are one weight; "
                "set both alike"
            )
        return super().tie_weights(layer, embed_tokens)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Quantize, or log why not. A tied weight is not freed while the embedding holds it too."""
        what = "head" if self.variable == VARIABLE else "embedding"
        if self.shares(layer):
            logger.info(
                "%s=int%d: the head is the tied embedding's weight; both share it",
                self.variable,
                self.bits,
            )
            return
        weight: Tensor = layer.get_parameter("weight")
        rows, columns = weight.shape
        try:
            group = head_group(columns, self.bits)
        except RacError as error:
            raise RacError(f"{self.variable}=int{self.bits}: {error}") from error
        stored_as = torch.int8 if self.bits == 8 else torch.int32
        group_bytes = 4 if self.bits == 8 else 2
        device = weight.device.type
        decision, backend = choose(
            Layer(rows, columns, 1.0, stored_as, weight.dtype, group, group_bytes), device
        )
        if self.variable == EMBEDDING and device != "cpu":
            decision, backend = (
                stay_dense(
                    f"rows are looked up in packed weights on CPUs only, not {device}", weight.dtype
                ),
                None,
            )
        if backend is None:
            logger.info(
                "%s=int%d: the %s stays as it is stored: %s",
                self.variable,
                self.bits,
                what,
                decision.reason,
            )
            self.keep_plain(layer)
            return
        values, scale = round_head(weight.data, self.bits)
        change = relative_error(weight.data, values, scale)
        nbytes = weight.nbytes
        stored = replace(all_stored(values, what), scale=scale, bits=self.bits)
        self.keep_packed(layer, backend, stored, weight.dtype)
        runs = (
            f"runs on the {decision.reason}"
            if what == "head"
            else f"takes {decision.bytes_per_weight:.2f} bytes per weight"
        )
        logger.info(
            "%s=int%d: the %s [%d, %d] %s; rounding changed its weights by %.1f %% of their norm; "
            "`rac head` measures what a rounded head does to predictions",
            *(self.variable, self.bits, what, rows, columns, runs, 100 * change),
        )
        if self.tied is not None:
            logger.info(
                "the embedding that is tied to the head keeps its own copy of %.1f MB; %s=int%d lets both share one",
                *(nbytes / 1e6, EMBEDDING, self.bits),
            )


class UntiedHeadMethod(UnquantizedEmbeddingMethod):
    """vLLM's method of a head that stays in floats, beside an embedding that is rounded: they must be two weights."""

    def tie_weights(self, layer: torch.nn.Module, embed_tokens: torch.nn.Module) -> NoReturn:
        """Refuse, since one weight would be kept twice (RacError)."""
        bits = wanted_bits(EMBEDDING)
        raise RacError(
            f"{EMBEDDING}=int{bits}: this model's embedding is its head, too; set {VARIABLE}=int{bits} as well, or unset "
            f"{EMBEDDING}"
        )
