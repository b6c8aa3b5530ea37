"""Hold the codes of a checkpoint that recovery trains."""

from collections.abc import Collection
from typing import Any

import torch
from compressed_tensors.compressors.base import BaseCompressor, decompress_module
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization import QuantizationScheme, QuantizationStatus
from compressed_tensors.utils import get_direct_state_dict, replace_direct_state_dict
from torch import Tensor

from rac_modifier.errors import RacError
from rac_modifier.formats.encoding import Encoding, used_scale
from rac_modifier.formats.schemes import stored_encoding
from rac_modifier.formats.stored_weight import SCALE
from rac_modifier.formats.words import WORDS, ZEROS
from rac_modifier.recovery.on_grid import QuantizedWeight, codes_of, master_in_cell, pruned_share

_PRUNED = 0.05  # least share of zeros, without rounded ones, of a pruned module


def quantized_names(tensors: Collection[str]) -> set[str]:
    """Return the modules that have scales or int32 words among tensor names."""
    return {n.rpartition(".")[0] for n in tensors if n.rpartition(".")[2] in (SCALE, WORDS)}


def check_layers(model: Any, stored: Collection[str]) -> None:
    """Refuse a model whose codes cannot be trained (RacError); its files quantize `stored`."""
    modules = _modules_with_codes(model)
    for name, module in modules.items():
        if module is model.get_input_embeddings():
            raise RacError(
                f"recover: {name} is quantized; embeddings are not trained and have to be the "
                f"dense model's: quantize again, with {name} in ignore"
            )
        if module is not model.get_output_embeddings():  # a head is written back as it was
            stored_encoding(module.quantization_scheme, name)
    if len(stored) > len(modules):  # names may differ: transformers renames modules of some models
        missing = sorted(set(stored) - set(modules))
        raise RacError(
            f"{missing[0]} ({len(missing)} in all) is quantized and no linear layer once loaded "
            "(merged experts), so its codes are not trained; recover before quantization"
        )


def _modules_with_codes(model: torch.nn.Module) -> dict[str, Any]:
    schemes = {n: (m, getattr(m, "quantization_scheme", None)) for n, m in model.named_modules()}
    return {
        name: module
        for name, (module, scheme) in schemes.items()
        if isinstance(scheme, QuantizationScheme) and scheme.weights is not None
    }


class QuantizedCheckpoint:
    """Make a loaded model's quantized linear layers hold code times scale, until `encode`.

    `recorded`: modules that config.json says are pruned. `quantized` has grid, scales and masters
    by module name, and `pruned` the modules whose zeros have to stay. A quantized head is the
    dense model's until `encode`, which writes its stored codes.
    """

    def __init__(self, model: Any, dense: Any, recorded: Collection[str]):
        self._modules = _modules_with_codes(model)
        originals = dict(dense.named_modules())
        self.quantized: dict[str, QuantizedWeight] = {}
        self.pruned: set[str] = set()
        self._heads: list[tuple[Any, torch.nn.Parameter]] = []  # one or none, as stored
        for name, module in self._modules.items():
            grid = stored_encoding(module.quantization_scheme, name)
            decompress_module(module)
            original = originals[name].weight.detach()
            if module is model.get_output_embeddings():
                self._heads.append((module, module.weight))
                module.weight = torch.nn.Parameter(original.clone(), requires_grad=False)
                continue
            weight, codes = _decoded(module, grid, name, original)
            zeros = pruned_share(codes, weight.scale, grid, original.to(codes.device))
            if name in recorded or zeros >= _PRUNED:
                assert weight.master is not None
                self.pruned.add(name)
                weight.master.mul_(codes != 0)  # a pruned weight starts at 0
            plain = module.weight.data.to(original.dtype)
            module.weight = torch.nn.Parameter(plain, requires_grad=False)
            self.quantized[name] = weight
        if hasattr(model, "ct_decompress_hook"):
            model.ct_decompress_hook.remove()
            del model.ct_decompress_hook

    def encode(self) -> None:
        """Compress the modules again, to the codes that code times scale was made of."""
        for head, stored in self._heads:
            head.weight = stored
        for module in self._modules.values():
            module.quantization_status = QuantizationStatus.FROZEN
            compress_exactly(module)

    @property
    def packs(self) -> bool:
        """Return whether the codes of all pruned modules can be stored sparse."""
        return all(self.quantized[name].grid.can_be_sparse for name in self.pruned)


def _decoded(
    module: torch.nn.Module, grid: Encoding, name: str, dense: Tensor
) -> tuple[QuantizedWeight, Tensor]:
    """Return how a module is quantized, its master on the side of `dense`; and its codes."""
    weight = module.get_parameter("weight").data
    scale = _checked_scale(scale_in_use(module), weight, grid, name).clone()
    zero = None
    if not grid.symmetric:
        zero = module.get_parameter(ZEROS).data if hasattr(module, ZEROS) else torch.empty(0)
        if zero.numel() != scale.numel():
            raise RacError(
                f"{name}.{ZEROS}: {list(zero.shape)} fits no scales {list(scale.shape)}; restore it"
            )
        zero = zero.reshape(scale.shape).clone()
    codes = codes_of(weight, scale, grid, zero)
    master = master_in_cell(codes, scale, grid, dense.to(weight.device))
    return QuantizedWeight(grid, scale, master, zero), codes


def _checked_scale(scale: Tensor, weight: Tensor, grid: Encoding, name: str) -> Tensor:
    """Return usable scales [rows, groups]; RacError if a used one is zero or infinite."""
    groups = grid.groups(weight.shape[1])
    if scale.numel() != weight.shape[0] * groups:
        raise RacError(
            f"{name}.{SCALE}: shape {list(scale.shape)} does not fit a weight "
            f"{list(weight.shape)} of {groups} groups"
        )
    scale = scale.reshape(-1, groups)
    least = torch.finfo(scale.dtype).tiny
    by_group = weight.split(grid.group_size or weight.shape[1], dim=1)
    used = torch.stack([part.ne(0).any(1) for part in by_group], dim=1)
    right = scale.isfinite() & (scale.abs() >= least)
    wrong = used & ~right
    if bool(wrong.any()):
        raise RacError(
            f"{name}.{SCALE}: {int(wrong.sum())} scales are not finite, or smaller than "
            f"{least:.2g}, such as {float(scale[wrong][0]):.3g}; quantize the model again "
            f"with normal {str(scale.dtype).removeprefix('torch.')} scales"
        )
    return torch.where(right, scale, torch.ones_like(scale))


def scale_in_use(module: torch.nn.Module) -> Tensor:
    """Return what a module's codes are multiplied by, [rows, groups]."""
    scale = module.get_parameter("weight_scale").detach()
    return used_scale(scale, getattr(module, "weight_global_scale", None))


def compress_exactly(module: Any) -> None:
    """Compress a module as llm-compressor does, but divide in float32: bfloat16 changes codes."""
    if module.quantization_status >= QuantizationStatus.COMPRESSED:
        return
    scheme = module.quantization_scheme
    scheme.format = scheme.format or infer_module_format(type(module), scheme)
    state = get_direct_state_dict(module)
    name = str(getattr(scheme.format, "value", scheme.format))
    compressor = BaseCompressor.get_value_from_registry(name)
    exact = {**state, "weight": state["weight"].float()}
    replace_direct_state_dict(module, compressor.compress(exact, scheme))
    module.quantization_status = QuantizationStatus.COMPRESSED
