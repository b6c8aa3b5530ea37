"""With `--quantization rac`, AWQ checkpoints of 4 bits (version gemm) run on our kernels."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from vllm.model_executor.layers.quantization.auto_awq import AutoAWQConfig
from vllm.model_executor.layers.quantization.utils.quant_utils import is_layer_skipped

from rac_modifier.checkpoint.gptq_awq import check_awq
from rac_modifier.errors import RacError
from rac_modifier.vllm_plugin.codes_config import CodesConfig, Scheme, entry, group_of, no_effect
from rac_modifier.vllm_plugin.gptq_awq_linear import Reader

_BITS = 4  # AWQ has no others


class AwqCodesConfig(CodesConfig, AutoAWQConfig):
    """vLLM's config of an AWQ checkpoint."""

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> AwqCodesConfig:
        """From the checkpoint's `quantization_config`.

        Raises:
            RacError: a malformed entry, a layout of words that is not read here, or no weights that the kernels read.
        """
        bits = entry(config, ("w_bit", "bits"), int)
        group_of(entry(config, ("q_group_size", "group_size"), int))
        entry(config, ("zero_point",), bool)
        if bits != _BITS:
            raise no_effect(f"its weights are int{bits}, not int{_BITS}")
        version = entry(config, ("version", "checkpoint_format", "format"), str, default="gemm")
        if config.get("backend") == "llm-awq":
            version = "of llm-awq"
        if version.lower() != "gemm":
            raise RacError(
                f"config.json: the words of this AWQ checkpoint are in version {version}, and those of gemm are read here; leave "
                "out --quantization rac, or take a checkpoint of version gemm"
            )
        made: AwqCodesConfig = super().from_config(config)
        made.set_up([bits])
        return made

    def scheme_of(self, layer: torch.nn.Module, module: str) -> Scheme | None:
        """The same for all modules that `modules_to_not_convert` does not name."""
        if is_layer_skipped(module, self.modules_to_not_convert, match_mode="substring"):
            return None
        return Scheme(self.weight_bits, group_of(self.group_size), not self.zero_point)

    def reader_of(self, scheme: Scheme) -> Reader:
        """What reads the tensors of a module."""
        return partial(check_awq, group=scheme.group, symmetric=scheme.symmetric)
