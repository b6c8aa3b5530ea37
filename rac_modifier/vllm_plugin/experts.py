"""Mixture-of-experts layers: packed experts are expanded while they are loaded, since no grouped sparse kernel exists."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

from rac_modifier.checkpoint.formats import PARTS
from rac_modifier.checkpoint.stored_weight import check
from rac_modifier.errors import RacError
from rac_modifier.kernels.plan import Summary, stay_dense
from rac_modifier.vllm_plugin.sparse_layers import SparseLayers


def expand_experts(layer: Any, prefix: str, layers: SparseLayers, inner: Any, summary: Summary) -> Any:
    """Have the experts of `layer` expanded on their way in; the method that runs them is vLLM's (`inner`, or its default).

    vLLM's loader of experts drops tensors that are not called weights, so it is given weights. It is called once for each
    run of consecutive names, hence what waits for its other parts is kept between calls.
    """
    if layers.format is None:
        return inner
    format = layers.format
    method = inner if inner is not None else UnquantizedFusedMoEMethod(layer.moe_config)
    load, finish = layer.load_weights, method.process_weights_after_loading
    waiting: dict[str, dict[str, Tensor]] = {}

    def finish_complete(layer: torch.nn.Module) -> None:
        check_complete(waiting, format, prefix)
        finish(layer)

    layer.load_weights = lambda weights: load(expanded(weights, format, prefix, waiting))
    method.process_weights_after_loading = finish_complete
    summary.expect()
    summary.add(prefix, stay_dense("experts have no sparse kernel: expanded at load", torch.bfloat16))
    return method


def expanded(
    weights: Iterable[tuple[str, Tensor]], format: str, prefix: str, waiting: dict[str, dict[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """The stream of named tensors with each packed `<module>.<part>` replaced by `<module>.weight` when it is complete.

    Raises:
        RacError: a damaged module.
    """
    for name, tensor in weights:
        module, _, part = name.rpartition(".")
        if part not in PARTS[format]:
            yield name, tensor
            continue
        parts = waiting.setdefault(module, {})
        parts[part] = tensor
        if len(parts) == len(PARTS[format]):
            yield f"{module}.weight", check(waiting.pop(module), format, f"{prefix}.{module}", scaled=False).dense()


def check_complete(waiting: dict[str, dict[str, Tensor]], format: str, prefix: str) -> None:
    """Raise RacError if a module still waits for a part."""
    for module, parts in waiting.items():
        lost = next(part for part in PARTS[format] if part not in parts)
        raise RacError(f"{prefix}.{module}.{lost}: missing from the checkpoint; copy or save the checkpoint again")
