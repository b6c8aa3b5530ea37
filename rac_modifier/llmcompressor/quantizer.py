"""Quantize in the pruning pass: upstream has the schemes, rounding is ours."""

from collections.abc import Container, Iterator, Mapping
from math import gcd
from typing import Any

import torch
from compressed_tensors.quantization import (
    QuantizationScheme,
    QuantizationStrategy,
    preset_name_to_scheme,
)
from compressed_tensors.utils import match_named_modules, match_targets, update_offload_parameter
from llmcompressor.modifiers.quantization import QuantizationModifier
from torch import Tensor
from transformers import PreTrainedModel

from rac_modifier.errors import RacError, refusing
from rac_modifier.formats.encoding import Encoding
from rac_modifier.formats.schemes import describe_scheme, encoding_of
from rac_modifier.llmcompressor.targets import has_merged_experts
from rac_modifier.recovery.on_grid import QuantizedWeight
from rac_modifier.recovery.trained_codes import compress_exactly, scale_in_use
from rac_modifier.settings.pruning import QuantizationSettings


class Quantizer:
    """Hold schemes (`described`) and `grids` of the modules `names`; none without `settings`.

    RacError for a scheme that cannot be rounded, or groups that do not divide the inputs.
    """

    def __init__(
        self,
        settings: QuantizationSettings | None,
        model: PreTrainedModel,
        names: Mapping[torch.nn.Module, str],
        *,
        prunes: bool,
    ):
        self.grids: dict[torch.nn.Module, Encoding] = {}
        self.described: dict[str, str] = {}
        self._upstream: QuantizationModifier | None = None
        if settings is None:
            return
        quantizable = torch.nn.Linear, torch.nn.Embedding
        every = {name for name, module in model.named_modules() if isinstance(module, quantizable)}
        self._upstream = QuantizationModifier(
            scheme=settings.scheme if settings.group_size is None else None,
            config_groups=_checked_groups(settings),
            ignore=sorted(every - set(names.values())),
        )
        groups = self._upstream.resolved_config.config_groups
        _check_targets(groups, model, names)
        for name, module, scheme in _scheme_of_each(model, groups, self._upstream.ignore):
            if module not in names:
                continue
            grid = self.grids[module] = encoding_of(scheme, name, prunes=prunes)
            self.described[name] = describe_scheme(scheme)
            columns = module.get_parameter("weight").shape[1]
            if grid.group_size and columns % grid.group_size:
                raise RacError(
                    f"{name}: {columns} inputs are no multiple of group_size {grid.group_size}; "
                    f"set quantization.group_size={gcd(columns, grid.group_size)} (in config_groups"
                    " that of the group), or add the module to ignore"
                )
        if not self.grids:
            raise RacError(
                "quantization: targets match no module of this entry; leave targets out for all"
            )

    def follow_names(
        self, new_names: Mapping[str, str], modules: Container[torch.nn.Module]
    ) -> None:
        """Rename modules from `new_names`, and forget those that are not among `modules`."""
        self.grids = {module: grid for module, grid in self.grids.items() if module in modules}
        kept = new_names.items()
        self.described = {new: self.described[old] for old, new in kept if old in self.described}

    def attach(self, model: PreTrainedModel) -> None:
        """Give the modules schemes and scales of zero; no forward pass quantizes yet.

        Upstream's scales are uninitialized, and the key of a run has the model's fingerprint.
        """
        if self._upstream is not None:
            self._upstream.initialize_quantization(model)
        for module in self.grids:
            for name, scale in dict(module.named_parameters(recurse=False)).items():
                if name not in ("weight", "bias"):
                    update_offload_parameter(module, name, torch.zeros_like(scale))

    def finish(self, model: PreTrainedModel) -> None:
        """Let forward passes quantize, also activations if a scheme has them."""
        if self._upstream is not None:
            self._upstream.end_calibration(model)

    def take_masters(
        self, names: Mapping[torch.nn.Module, str], masters: dict[str, Tensor]
    ) -> dict[str, QuantizedWeight]:
        """Return by name what training through codes starts from; it takes `masters`."""
        weights = {}
        for module, grid in self.grids.items():
            scale, zero = scale_in_use(module).clone(), None
            if not grid.symmetric:
                zero = module.get_parameter("weight_zero_point").detach().clone()
            weights[names[module]] = QuantizedWeight(grid, scale, masters.pop(names[module]), zero)
        return weights

    def compress(self) -> None:
        """Compress as llm-compressor does, with the codes that were measured."""
        for module in self.grids:
            compress_exactly(module)


def _scheme_of_each(
    model: PreTrainedModel, groups: Mapping[str, QuantizationScheme], ignore: list[str]
) -> Iterator[tuple[str, torch.nn.Module, QuantizationScheme]]:
    """Yield each matched module with the scheme that compressed-tensors gives it.

    Of several targets that match, that is the scheme of the most specific: name, pattern, class.
    """
    by_target = {target: scheme for scheme in groups.values() for target in scheme.targets}
    for name, module in match_named_modules(model, list(by_target), ignore):
        yield name, module, by_target[match_targets(name, module, by_target)[0]]


def _check_targets(
    groups: Mapping[str, QuantizationScheme],
    model: PreTrainedModel,
    names: Mapping[torch.nn.Module, str],
) -> None:
    """Refuse a target that matches none of the modules `names` (RacError)."""
    targets = [target for scheme in groups.values() for target in scheme.targets]
    for target in targets:
        matched = any(match_targets(name, module, [target]) for module, name in names.items())
        if not matched and not has_merged_experts(model):
            raise RacError(
                f"quantization: the target {target!r} matches no module of this entry; correct it, "
                "or leave targets out for all"
            )


def _checked_groups(settings: QuantizationSettings) -> dict[str, Any] | None:
    """Return the config groups with targets; RacError for one that is no scheme.

    A preset whose group size is changed becomes a group; RacError for one without groups.
    """
    if settings.config_groups is None and settings.group_size is not None:
        scheme = settings.scheme or {}
        targets = {scheme: ["Linear"]} if isinstance(scheme, str) else scheme
        presets = {name: preset_name_to_scheme(name, to) for name, to in targets.items()}
        for name, preset in presets.items():
            if preset.weights is None or preset.weights.strategy != QuantizationStrategy.GROUP:
                raise RacError(
                    f"quantization.group_size: {settings.group_size} has no effect on {name}, "
                    "which has no groups of a free size; leave it out"
                )
            preset.weights.group_size = settings.group_size
        return presets
    if settings.config_groups is None:
        return None
    groups = {
        name: {"targets": ["Linear"], **group} for name, group in settings.config_groups.items()
    }
    for name, group in groups.items():
        step = "see compressed-tensors' QuantizationScheme"
        with refusing(f"config_groups.{name}: no scheme", step, ValueError, NotImplementedError):
            QuantizationScheme.model_validate(group)
    return groups
