"""The entry point `vllm.general_plugins`: vLLM calls `register` in every one of its processes.

Importing this module costs nothing. A plugin that fails must not take the server down for models that it has no part in,
so whatever goes wrong becomes one warning.
"""

from __future__ import annotations

import logging
from typing import get_args

METHOD = "rac-sparse"
_logger = logging.getLogger(f"vllm.{__name__}")  # below "vllm", so that vLLM's handlers print it


def register() -> None:
    """Make packed sparse checkpoints known to vLLM; again and again does no harm, and nothing is raised."""
    try:
        _register()
    except Exception as error:
        _logger.warning(
            "rac-modifier does not fit this vLLM (%s: %s); its sparse checkpoints will not load, other models are "
            "not affected; see docs/serving.md for the versions that work",
            type(error).__name__,
            error,
        )


def _register() -> None:
    from vllm.model_executor.layers import quantization

    if METHOD in get_args(quantization.QuantizationMethods):
        _logger.warning("this vLLM has the method %s itself; rac-modifier steps aside", METHOD)
        return
    from rac_modifier.vllm_plugin.quant_config import RacSparseConfig

    quantization.register_quantization_config(METHOD)(RacSparseConfig)
