"""With `--quantization rac`, GPTQ checkpoints of 2 to 4 bits run on our kernels, asymmetric and reordered ones too."""

from __future__ import annotations

import re
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.auto_gptq import AutoGPTQConfig
from vllm.model_executor.layers.quantization.utils.gptq_utils import get_linear_quant_method
from vllm.scalar_type import scalar_types

from rac_modifier.checkpoint.dense_codes import BITS
from rac_modifier.checkpoint.gptq_awq import GPTQ_V1, GPTQ_V2, check_gptq
from rac_modifier.errors import RacError
from rac_modifier.vllm_plugin.codes_config import (
    RESTORE,
    CodesConfig,
    Scheme,
    entry,
    group_of,
    no_effect,
)
from rac_modifier.vllm_plugin.gptq_awq_linear import Reader

if TYPE_CHECKING:
    from vllm.model_executor.models.utils import WeightsMapper

_SKIPPED = "-:"  # begins a dynamic rule whose modules are in floats


class GptqCodesConfig(CodesConfig, AutoGPTQConfig):
    """vLLM's config of a GPTQ checkpoint, which also knows what vLLM has no kernel for.

    `refusal`: why vLLM refuses the whole checkpoint; None where it does not. `reordered`: columns may be reordered.
    """

    # What config.json may say; vLLM's own has two of these.
    TYPE_MAP = {
        (2, True): scalar_types.uint2b2,
        (2, False): scalar_types.uint2,
        (3, True): scalar_types.uint3b4,
        (3, False): scalar_types.uint3,
        (4, True): scalar_types.uint4b8,
        (4, False): scalar_types.uint4,
        (8, True): scalar_types.uint8b128,
        (8, False): scalar_types.uint8,
    }

    refusal: str | None
    format: str
    reordered: bool

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> GptqCodesConfig:
        """From the checkpoint's `quantization_config`.

        Raises:
            RacError: a malformed entry, a layout of words that is not read here, or no weights that the kernels read.
        """
        bits, dynamic = entry(config, ("bits",), int), entry(config, ("dynamic",), dict, default={})
        group_of(entry(config, ("group_size",), int))
        found = {bits}
        for pattern, rule in dynamic.items():
            if not isinstance(rule, dict):
                raise RacError(
                    f"config.json: quantization_config.dynamic.{pattern} is {rule!r}, but must be a table; {RESTORE}"
                )
            if pattern.startswith(_SKIPPED):
                continue
            found.add(entry(rule, ("bits",), int, default=bits))
            group_of(entry(rule, ("group_size",), int, default=-1), f"dynamic.{pattern}.group_size")
            entry(rule, ("sym",), bool, default=True)
        for each in sorted(found):
            if (each, True) not in cls.TYPE_MAP:
                raise RacError(
                    f"config.json: quantization_config.bits is {each}; GPTQ has weights of 2, 3, 4 or 8 bits"
                )
        if not found & {*BITS}:
            raise no_effect(f"its weights are int{bits}, not int4, int3 or int2")
        format = entry(config, ("checkpoint_format", "format"), str, default=GPTQ_V1)
        if config.get("is_marlin_format"):
            format = "marlin"
        if format not in (GPTQ_V1, GPTQ_V2):
            raise RacError(
                f"config.json: the words of this checkpoint are in the format {format}, and those of {GPTQ_V1} and {GPTQ_V2} are "
                "read here; leave out --quantization rac, or take a checkpoint in one of these"
            )
        entry(config, ("sym",), bool)
        plain = {
            **config,
            "desc_act": False,
            "dynamic": {pattern: _plain(rule) for pattern, rule in dynamic.items()},
        }
        made: GptqCodesConfig = super().from_config(plain)  # g_idx has the order of columns
        made.full_config, made.format = config, format
        made.reordered = bool(config.get("desc_act")) or any(
            bool(rule.get("desc_act")) for rule in dynamic.values()
        )
        made.refusal = _refusal({"desc_act": False, **config})
        made.set_up(found & {*BITS})
        return made

    def scheme_of(self, layer: torch.nn.Module, module: str) -> Scheme | None:
        """As config.json and its dynamic rules say for a module on disk."""
        found = get_linear_quant_method(self, layer, module, _itself)
        if not isinstance(found, AutoGPTQConfig):
            return None
        return Scheme(found.weight_bits, group_of(found.group_size), found.is_sym)

    def why_vllm_refuses(
        self, layer: torch.nn.Module, prefix: str, scheme: Scheme | None
    ) -> str | None:
        """For the whole checkpoint, this kind of weight, or because vLLM reads the rules by a fused layer's name."""
        if self.refusal is not None:
            return self.refusal
        if scheme is None:
            return None
        if (scheme.bits, scheme.symmetric) not in AutoGPTQConfig.TYPE_MAP:
            return f"Unsupported quantization config: bits={scheme.bits}, sym={scheme.symmetric}"
        if isinstance(layer, LinearBase) and self.scheme_of(layer, prefix) != scheme:
            return "it reads the dynamic rules by the name of the fused layer, and these name its parts"
        return None

    def reader_of(self, scheme: Scheme) -> Reader:
        """What reads the tensors of a module."""
        return partial(
            check_gptq,
            bits=scheme.bits,
            group=scheme.group,
            symmetric=scheme.symmetric,
            format=self.format,
            reordered=self.reordered,
        )

    @staticmethod
    def get_checkpoint_weight_mapper() -> WeightsMapper:
        """Let the loader pass on `g_idx`, which vLLM's own mapper drops; layers of experts have no place for it."""
        from vllm.model_executor.models.utils import WeightsMapper

        return WeightsMapper(orig_to_new_regex={re.compile(r"\.experts\..*\.g_idx$"): None})


def _itself(config: AutoGPTQConfig) -> AutoGPTQConfig:
    return config


def _plain(rule: Any) -> Any:
    return (
        {name: value for name, value in rule.items() if name != "desc_act"}
        if isinstance(rule, dict)
        else rule
    )


def _refusal(config: dict[str, Any]) -> str | None:
    try:
        AutoGPTQConfig.from_config(config)
    except ValueError as error:
        return str(error)
    return None
