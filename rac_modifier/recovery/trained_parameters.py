"""Which parameters are trained, in which dtype, and under which names."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from rac_modifier.recovery.on_grid import QuantizedWeight


@contextlib.contextmanager
def in_float32(model: Any) -> Iterator[None]:
    """Train all weights but embeddings and head, in float32, inside this context.

    Dtypes and `requires_grad` come back at the end. Buffers are not changed: rotary frequencies would
    lose precision on their way through bfloat16.
    """
    frozen = frozen_parameters(model)
    before = {name: (p.dtype, p.requires_grad) for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            continue
        parameter.requires_grad_(
            id(parameter) not in frozen and name.rpartition(".")[2] in ("weight", "bias")
        )
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():
            dtype, requires_grad = before[name]
            parameter.grad = None
            parameter.data = parameter.data.to(dtype)
            parameter.requires_grad_(requires_grad)


def frozen_parameters(model: Any) -> set[int]:
    """Return the ids of the parameters of embeddings and head."""
    return {
        id(p)
        for part in (model.get_input_embeddings(), model.get_output_embeddings())
        for p in part.parameters()
    }


def trained_name(name: str, quantized: Mapping[str, QuantizedWeight]) -> str:
    """Return a parameter's name in training; a quantized weight is parametrized by its master."""
    module, _, leaf = name.rpartition(".")
    return (
        f"{module}.parametrizations.{leaf}.original"
        if module in quantized and leaf == "weight"
        else name
    )
