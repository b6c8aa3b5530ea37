"""Activation sparsity in transformers: small inputs of linear layers count as zero while decoding.

Input j of a generated token is zero where |x_j| < thresholds[j]; prompts run dense. By itself a
forward pass over one token per sequence with a filled cache reads generated tokens, as in
`generate`. Teacher forcing names them with `generated_tokens`.
"""

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

_NAME = "_rac_skipped_inputs"


class SkippedInputs:
    """Hooks of a model that skip inputs below thresholds, float32 [in_features] by module."""

    def __init__(self, model: Any, thresholds: Mapping[str, Tensor]) -> None:
        self.generated: Tensor | None = None  # bool [sequences, tokens], as `generated_tokens` says
        self._here: Tensor | None = None  # in the forward pass that runs; None: no token
        model.get_decoder().register_forward_pre_hook(self._begin, with_kwargs=True)
        for name, values in thresholds.items():
            model.get_submodule(name).register_forward_pre_hook(partial(self._skip, values))
        setattr(model, _NAME, self)

    def _begin(self, decoder: Any, args: Any, kwargs: dict[str, Any]) -> None:
        given = (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
        tokens = next(tensor for tensor in given if tensor is not None)
        self._here, cache = self.generated, kwargs.get("past_key_values")
        if self._here is None and tokens.shape[1] == 1 and cache is not None:
            decodes = cache.get_seq_length() > 0
            self._here = torch.ones(tokens.shape[:2], dtype=torch.bool) if decodes else None

    def _skip(self, thresholds: Tensor, module: Any, args: tuple[Tensor, ...]) -> Any:
        if self._here is None:
            return args
        x = args[0]
        here = self._here.to(x.device).reshape(*x.shape[:-1], 1)
        return (x.masked_fill((x.abs() < thresholds.to(x.device)) & here, 0.0), *args[1:])


@contextlib.contextmanager
def generated_tokens(model: Any, generated: Tensor) -> Iterator[None]:
    """Say which tokens [sequences, tokens] a forward pass reads that the model generated.

    Without effect on a model that skips no inputs.
    """
    skipped = getattr(model, _NAME, None)
    if skipped is None:
        yield
        return
    skipped.generated = generated
    try:
        yield
    finally:
        skipped.generated = None
