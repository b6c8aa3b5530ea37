"""The light entry point `vllm.general_plugins`: vLLM calls `register` in every process."""

import logging
from typing import get_args

from rac_modifier.vllm_plugin import METHOD

_logger = logging.getLogger(f"vllm.{__name__}")  # below "vllm", so that vLLM's handlers print it


def register() -> None:
    """Add the method for packed checkpoints to vLLM; idempotent, never raises."""
    try:
        _register()
    except Exception as error:
        _logger.warning(
            "rac-modifier does not fit this vLLM (%s: %s); its sparse checkpoints will not load, "
            "other models are not affected; see docs/serving.md for the versions that work",
            *(type(error).__name__, error),
        )


def _register() -> None:
    from vllm.model_executor.layers import quantization

    if METHOD in get_args(quantization.QuantizationMethods):
        _logger.warning(
            "this vLLM has its own method %s; the one of rac-modifier is not registered", METHOD
        )
        return
    from rac_modifier.vllm_plugin.config import RacConfig

    quantization.register_quantization_config(METHOD)(RacConfig)
