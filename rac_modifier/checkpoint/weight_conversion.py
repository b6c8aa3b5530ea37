"""transformers' weight converters for packed weights: parts in, dense tensors out.

Nothing of `transformers.modeling_utils` may be imported here: this module is imported while
that one is.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightTransform

from rac_modifier.checkpoint.dense_codes import WORDS, to_words
from rac_modifier.checkpoint.formats import PARTS, check
from rac_modifier.checkpoint.stored_weight import FLOATS
from rac_modifier.errors import RacError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Unpack(ConversionOps):
    """Makes the dense tensors of one packed weight; one instance serves a whole load.

    errors: for the quantizer; transformers would turn an error into a RuntimeError of its own.
    dtypes: the dtype to load each weight in, by full name.
    """

    def __init__(self, format: str, dtypes: Mapping[str, torch.dtype]) -> None:
        self.format = format
        self.dtypes = dtypes
        self.errors: list[RacError] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> Unpack:
        """Return itself: transformers copies a converter with its operations per tensor."""
        return self

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str = "",
        model: PreTrainedModel | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return `weight`, or `weight_packed` and `weight_shape`, by full name; {} if damaged."""
        assert model is not None
        module, _, target = full_layer_name.rpartition(".")
        try:
            weight, in_int32 = self.dense(
                {pattern: tensors[0] for pattern, tensors in input_dict.items()}, module
            )
            if target == WORDS:
                words = to_words(weight, 4 if in_int32 else 8)
                return {f"{module}.{part}": tensor for part, tensor in words.items()}
            expected = model.get_parameter_or_buffer(full_layer_name)
            if weight.shape != expected.shape:
                raise misfit(full_layer_name, weight.shape, expected.shape)
            return {full_layer_name: self.cast(weight, full_layer_name)}
        except RacError as error:
            self.errors.append(error)
            return {}

    def dense(self, by_pattern: Mapping[str, Tensor], module: str) -> tuple[Tensor, bool]:
        """Return the dense weight of parts by source pattern, and whether they were words."""
        named = {
            pattern.removesuffix("$").rpartition(".")[2]: part
            for pattern, part in by_pattern.items()
        }
        dense = check(named, self.format, module, scaled=False).dense()
        return dense, named["compressed"].dtype == torch.int32

    def cast(self, weight: Tensor, name: str) -> Tensor:
        """Return `weight` in the dtype that the model's weight `name` is loaded in."""
        dtype = self.dtypes[name]
        if weight.dtype not in FLOATS and weight.dtype != dtype:
            raise RacError(
                f"{name}: its values are {weight.dtype}, but no config group of "
                "config.json's quantization_config quantizes this module; restore the "
                "config.json that was saved with the weights"
            )
        return weight.to(dtype)


class UnpackExperts(WeightConverter):
    """A model's converter for experts, with packed experts unpacked before they are merged."""

    __slots__ = ("original", "unpack", "unpacked")

    def __init__(self, original: WeightConverter, unpack: Unpack) -> None:
        sources: list[str] = []
        unpacked: dict[str, tuple[str, ...]] = {}
        for pattern in original.source_patterns:
            stem, ending = _split(pattern)
            if ending in ("weight", WORDS):
                unpacked[pattern] = tuple(f"{stem}{part}$" for part in PARTS[unpack.format])
                sources += unpacked[pattern]
            sources.append(
                pattern if pattern.endswith("$") or ending != "weight" else pattern + "$"
            )
        super().__init__(sources, list(original._original_target_patterns), original.operations)
        self.scope_prefix, self.base_model_prefix = (
            original.scope_prefix,
            original.base_model_prefix,
        )
        self.original, self.unpack, self.unpacked = original, unpack, unpacked

    def convert(self, layer_name: str, model: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Convert as the original; {} if an expert is damaged, whose error `unpack` keeps."""
        collected = self.materialize_tensors()
        try:
            for pattern, sources in self.unpacked.items():
                if sources[0] in collected:
                    collected |= self._dense_experts(pattern, collected, layer_name)
        except RacError as error:
            self.unpack.errors.append(error)
            return {}
        self.collected_tensors: Any = defaultdict(
            list, collected
        )  # tensors instead of what is still to be read
        return super().convert(layer_name, model, *args, **kwargs)

    def _dense_experts(
        self, pattern: str, collected: dict[str, list[Tensor]], layer_name: str
    ) -> dict[str, list[Tensor]]:
        """Return the dense weights of all experts under the original's patterns."""
        stem, ending = _split(pattern)
        anchored = f"{stem}{ending}$"
        if anchored in collected:
            raise RacError(
                f"{layer_name}: some of its experts are packed and some are stored dense, "
                "which cannot be merged; prune all experts of a layer, or save the model "
                "with storage: dense"
            )
        by_source = {part: collected.pop(part) for part in self.unpacked[pattern]}
        scaled = any("weight_scale" in source for source in self.source_patterns)
        dense: dict[str, list[Tensor]] = defaultdict(list)
        for number in range(len(next(iter(by_source.values())))):
            weight, in_int32 = self.unpack.dense(
                {part: tensors[number] for part, tensors in by_source.items()},
                f"{layer_name} of expert {number}",
            )
            if ending == WORDS:
                for name, tensor in to_words(weight, 4 if in_int32 else 8).items():
                    dense[f"{stem}{name}$"].append(tensor)
            elif scaled and weight.dtype not in FLOATS:
                dense[anchored].append(
                    weight
                )  # upstream's first operation multiplies with the scales
            else:
                dense[anchored].append(self.unpack.cast(weight, layer_name))
        return dense


def updated_conversions(
    conversions: Iterable[WeightTransform], unpack: Unpack, int32_modules: Iterable[str]
) -> list[WeightTransform]:
    """Return a model's conversions and ours; `int32_modules`: in int32 words upstream."""
    updated = [
        UnpackExperts(c, unpack)
        if isinstance(c, WeightConverter) and "experts" in c.source_patterns[0]
        else c
        for c in conversions
    ]
    if names := "|".join(re.escape(name) for name in int32_modules):
        sources = [rf"^({names})\.{part}$" for part in PARTS[unpack.format]]
        updated.append(WeightConverter(sources, rf"\1.{WORDS}", operations=[unpack]))
    sources = [rf"\.{part}$" for part in PARTS[unpack.format]]
    return [*updated, WeightConverter(sources, ".weight", operations=[unpack])]


def conversions_for_saving(conversions: Iterable[WeightTransform]) -> list[WeightTransform]:
    """Return the conversions that a loaded model needs to be saved dense: the model's own."""
    return [
        c.original if isinstance(c, UnpackExperts) else c
        for c in conversions
        if not any(isinstance(operation, Unpack) for operation in getattr(c, "operations", ()))
    ]


def misfit(name: str, actual: Iterable[int], expected: Iterable[int]) -> RacError:
    """Return the error that a tensor has another shape than the model."""
    return RacError(
        f"{name}: its shape {list(actual)} does not fit the model's config.json, which says "
        f"{list(expected)}; restore the config.json that was saved with the weights"
    )


def _split(pattern: str) -> tuple[str, str]:
    """Return a source pattern before and behind its last dot."""
    stem, dot, ending = pattern.removesuffix("$").rpartition(".")
    return stem + dot, ending
