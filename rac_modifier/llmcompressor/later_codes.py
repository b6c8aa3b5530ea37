"""The weights that the recipe's other modifiers quantize: kept dense until they are trained through their codes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from compressed_tensors.utils import align_module_device, match_named_modules
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
from transformers import PreTrainedModel

from rac_modifier.checkpoint.stored_weight import SCALE
from rac_modifier.errors import RacError
from rac_modifier.llmcompressor.quantized_checkpoint import checked_scale, zero_points
from rac_modifier.llmcompressor.quantizer import compress_exactly
from rac_modifier.quantization.grid import Grid
from rac_modifier.quantization.schemes import stored_grid
from rac_modifier.recovery.cells import codes_of, master_in_cell
from rac_modifier.recovery.on_grid import QuantizedWeight


class LaterCodes:
    """The modules that the other modifiers of a recipe will quantize, with a copy of their dense weights on the CPU.

    Args:
        modifiers: the recipe's others; GPTQModifier and QuantizationModifier leave a weight in the space of the dense one.
        model: while it is still dense.

    Raises:
        RacError: another modifier, nothing that is quantized, an embedding or head that is, or a grid that cannot be trained.
    """

    def __init__(self, modifiers: Sequence[Modifier], model: PreTrainedModel):
        self._model = model
        self._grids: dict[str, Grid] = {}
        self._dense: dict[str, torch.Tensor] = {}
        fixed = (model.get_input_embeddings(), model.get_output_embeddings())
        for modifier in modifiers:
            if not isinstance(modifier, GPTQModifier | QuantizationModifier):
                raise RacError(
                    f"recover beside {type(modifier).__name__}: it trains what GPTQModifier or QuantizationModifier has rounded; "
                    "leave recover out, and run `rac recover` on the saved checkpoint"
                )
            config = modifier.resolved_config
            for scheme in config.config_groups.values():
                for name, module in match_named_modules(model, scheme.targets, modifier.ignore):
                    if scheme.weights is None:
                        continue
                    if any(module is part for part in fixed):
                        raise RacError(
                            f"recover: {name} is to be quantized; embeddings and head are not trained: add {name} to ignore of "
                            f"{type(modifier).__name__}"
                        )
                    self._grids[name] = stored_grid(scheme, name)
                    with align_module_device(module):
                        self._dense[name] = (
                            module.get_parameter("weight").detach().to("cpu", copy=True)
                        )
        if not self._grids:
            raise RacError(
                "recover: the recipe's other modifiers quantize no weight that could be trained; leave recover out"
            )

    def quantized(self) -> dict[str, QuantizedWeight]:
        """Grid, scales and master weights by module name, once the modules are quantized; the dense copies are let go."""
        found = {}
        for name, grid in self._grids.items():
            module: Any = self._model.get_submodule(name)
            weight = module.get_parameter("weight").data
            scale = checked_scale(module.get_parameter(SCALE).data, weight, grid, name).clone()
            zero = zero_points(module, grid, scale, name)
            codes = codes_of(weight, scale, grid, zero)
            master = master_in_cell(codes, scale, grid, self._dense.pop(name).to(weight.device))
            found[name] = QuantizedWeight(grid, scale, master, zero)
        return found

    def compress(self) -> None:
        """Compress as llm-compressor does when it saves, with the very codes that were trained."""
        for name in self._grids:
            compress_exactly(self._model.get_submodule(name))
