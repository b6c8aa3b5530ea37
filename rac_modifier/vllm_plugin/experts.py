"""Packed experts where there is no sparse kernel for them, as on GPUs: they are expanded while they are loaded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)

from rac_modifier.checkpoint.formats import PARTS
from rac_modifier.checkpoint.stored_weight import check
from rac_modifier.errors import RacError
from rac_modifier.kernels.interface import stay_dense
from rac_modifier.vllm_plugin.sparse_layers import SparseLayers
from rac_modifier.vllm_plugin.summary import Summary

logger = init_logger(f"vllm.{__name__}")


def expand_experts(
    layer: Any, prefix: str, layers: SparseLayers, inner: Any, summary: Summary
) -> Any:
    """Expand the experts of `layer` while they are loaded. vLLM's method runs them: `inner`, or its default.

    vLLM's loader of experts ignores tensors that are not named weights, so it is given weights. It is called once for each
    run of consecutive names, so incomplete modules are kept between calls.
    """
    if layers.format is None:
        return inner
    format = layers.format
    method = inner if inner is not None else UnquantizedFusedMoEMethod(layer.moe_config)
    load, finish = layer.load_weights, method.process_weights_after_loading
    incomplete: dict[str, dict[str, Tensor]] = {}

    def finish_complete(layer: torch.nn.Module) -> None:
        check_complete(incomplete, format, prefix)
        finish(layer)
        text = summary.add(
            prefix,
            stay_dense(
                "experts have no sparse kernel on this device: expanded at load", torch.bfloat16
            ),
        )
        if text is not None:
            logger.info("%s", text)

    layer.load_weights = lambda weights: load(expanded(weights, format, prefix, incomplete))
    method.process_weights_after_loading = finish_complete
    summary.expect()
    return method


def expanded(
    weights: Iterable[tuple[str, Tensor]],
    format: str,
    prefix: str,
    incomplete: dict[str, dict[str, Tensor]],
) -> Iterator[tuple[str, Tensor]]:
    """The stream of named tensors, with the parts of each packed module replaced by `<module>.weight` once all have come.

    `incomplete` keeps the parts of the other modules.

    Raises:
        RacError: a damaged module.
    """
    for name, tensor in weights:
        module, _, part = name.rpartition(".")
        if part not in PARTS[format]:
            yield name, tensor
            continue
        parts = incomplete.setdefault(module, {})
        parts[part] = tensor
        if len(parts) == len(PARTS[format]):
            yield (
                f"{module}.weight",
                check(incomplete.pop(module), format, f"{prefix}.{module}", scaled=False).dense(),
            )


def check_complete(incomplete: dict[str, dict[str, Tensor]], format: str, prefix: str) -> None:
    """Raise RacError if a module lacks a part."""
    for module, parts in incomplete.items():
        missing = next(part for part in PARTS[format] if part not in parts)
        raise RacError(
            f"{prefix}.{module}.{missing}: missing from the checkpoint; copy or save the checkpoint again"
        )
