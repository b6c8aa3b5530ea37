"""The quantization config that gives vLLM each layer's method, and the report of what runs.

Modules that need vLLM's layers are imported in functions: at registration vLLM has not loaded them.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.logger import init_logger
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)

from rac_modifier.checkpoint.files import INDEX_FILE, TensorFiles
from rac_modifier.checkpoint.formats import structure_of
from rac_modifier.errors import RacError
from rac_modifier.formats.quantization_config import (
    COMPRESSED_TENSORS,
    RAC_KEY,
    SparsityRecord,
)
from rac_modifier.kernels.cpu.support import support
from rac_modifier.kernels.interface import VLLMS, Decision, stay_dense
from rac_modifier.runtime.cpu_tuning import keep_freed_memory
from rac_modifier.vllm_plugin import METHOD, layouts
from rac_modifier.vllm_plugin.layouts import Layout
from rac_modifier.vllm_plugin.readers import CodesReader, WeightReader

if TYPE_CHECKING:
    from vllm.model_executor.models.utils import WeightsMapper

logger = init_logger(f"vllm.{__name__}")
DRAFT = "draft_model"  # vLLM's prefix of all layers of a draft (vllm.v1.spec_decode.draft_model)
# Modules whose rows a model of vLLM reorders in `load_weights`, by model type.
_LLAMA4 = ("q_proj", "k_proj")
_REORDERED = {
    "bloom": ("query_key_value",),
    "falcon": ("query_key_value",),
    "llama4": _LLAMA4,
    "llama4_text": _LLAMA4,
    "telechat": ("key_value",),
}


@dataclass
class LoadReport:
    """Collect the decisions of one model's layers, and log them with the last of `expected`."""

    requested: bool = False  # by --quantization rac, which must have an effect
    expected: int = 0
    decisions: dict[str, Decision] = field(default_factory=dict)

    def add(self, layer: str, decision: Decision | None) -> None:
        """Record an expected layer's decision (None: not compressed), and log after the last."""
        if decision is None:
            self.expected -= 1
        else:
            self.decisions[layer] = decision
        if not self.decisions or len(self.decisions) < self.expected:
            return
        layers: dict[str, list[str]] = {}
        for name, of_layer in self.decisions.items():
            text = of_layer.kernel if of_layer.sparse else of_layer.reason
            layers.setdefault(text, []).append(name)
        sparse = sum(of_layer.sparse for of_layer in self.decisions.values())
        lines = [f"rac: {sparse} of {len(self.decisions)} compressed layers run on a kernel"]
        lines += [f"{text}: {len(names)}, such as {names[0]}" for text, names in layers.items()]
        log = logger.info
        if self.requested and not sparse:
            log = logger.warning
            lines.append(f"--quantization {METHOD} has no effect on this model here; leave it out")
        log("%s", "\n  ".join(lines))
        if sparse:
            keep_freed_memory()  # new pages take a fifth of the time of a long prompt


class RacConfig(QuantizationConfig):
    """Packed sparse checkpoints, and on request dense weights that a kernel reads."""

    def __init__(self, layout: Layout | None = None, requested: bool = True) -> None:
        """Take a layout; vLLM has none for a model without a `quantization_config` (RacError)."""
        super().__init__()
        if layout is None:
            raise layouts.no_effect("it is not quantized; if pruned, rac pack makes it sparse")
        self.layout = layout
        self.int8_activations: tuple[str, ...] = ()  # modules whose inputs may be rounded to 8 bits
        self.reordered: tuple[str, ...] = ()  # last names of modules, from `_REORDERED`
        self.report = LoadReport(requested)
        self.embedding_is_stored = False

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Claim checkpoints that this package wrote, and on request those of other tools."""
        if layouts.is_packed(hf_quant_cfg) or user_quant == METHOD:
            return METHOD
        recorded = getattr(hf_config, RAC_KEY, None) is not None
        return METHOD if recorded and not user_quant and _runs_codes(hf_quant_cfg) else None

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Read the checkpoint's `quantization_config` (RacError: it has no effect)."""
        if layouts.is_packed(config):
            return cls(layouts.PackedLayout(config), requested=False)
        method = config.get("quant_method")
        if method == COMPRESSED_TENSORS:
            return cls(layouts.CodesLayout(config))
        if method in ("gptq", "awq"):
            return cls(layouts.GptqAwqLayout(config))
        raise layouts.no_effect(f"it is quantized by {method!r} and not packed sparse")

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Read what config.json records, before vLLM loads the folder `model_name` (RacError)."""
        model = getattr(hf_config, "model_type", "")
        one_key = model == "falcon" and hf_config.multi_query  # as Falcon-7B: the order stays
        if not one_key or hf_config.new_decoder_architecture:
            self.reordered = _REORDERED.get(model, ())
        if (Path(model_name) / INDEX_FILE).is_file():
            with TensorFiles(model_name):  # vLLM misses tensors of unquantized models only
                pass
        self.report.requested &= not hasattr(hf_config, RAC_KEY)
        record = SparsityRecord.of({RAC_KEY: getattr(hf_config, RAC_KEY, None)})
        for module, structure in record.modules.items():
            structure_of(structure, module)
        if isinstance(self.layout, layouts.CodesLayout) and record.modules:
            logger.info("this checkpoint is pruned and stored dense; `rac pack` makes it sparse")
        self.int8_activations = record.int8_activations

    @property
    def kv_cache_scheme(self) -> dict[str, Any] | None:
        """Return how vLLM's attention stores keys and values."""
        return getattr(self.layout.inner, "kv_cache_scheme", None)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: "WeightsMapper") -> None:
        """Rename modules as vLLM does."""

        def renamed(entries: Iterable[str]) -> tuple[str, ...]:
            return tuple(
                (hf_to_vllm_mapper.map_name(entry) or entry)
                if "." in entry and not entry.startswith("re:")
                else entry
                for entry in entries
            )

        self.layout.targets = renamed(self.layout.targets)
        self.layout.ignore = renamed(self.layout.ignore)
        self.int8_activations = renamed(self.int8_activations)
        if self.layout.inner is not None:
            self.layout.inner.apply_vllm_mapper(hf_to_vllm_mapper)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Return the method of one layer; None where vLLM's default runs it."""
        from vllm.model_executor.layers.fused_moe import RoutedExperts
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
        from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

        current = get_current_vllm_config_or_none()
        if current is not None and current.load_config.load_format == "dummy":
            raise RacError("--load-format dummy: random weights cannot be packed; leave it out")
        prefix = prefix.removeprefix(f"{DRAFT}.")  # the checkpoint's name of the layer
        if self.layout.inner is not None:  # the model has set the mapping
            self.layout.inner.packed_modules_mapping = self.packed_modules_mapping
        if isinstance(layer, VocabParallelEmbedding):
            return self._vocabulary(layer, prefix)
        if isinstance(layer, RoutedExperts):
            return self._experts(layer, prefix)
        if not isinstance(layer, LinearBase):
            return self._vllms(layer, prefix)
        parent, _, name = prefix.rpartition(".")
        shards = self.packed_modules_mapping.get(name) or [name]
        modules = [f"{parent}.{shard}" if parent else shard for shard in shards]
        reader = self.layout.reader(layer, modules)
        if reader is None or isinstance(reader, str):
            return self._vllms(layer, prefix, reader) or UnquantizedLinearMethod()
        self._check_order(layer, modules, reader)
        from rac_modifier.vllm_plugin.linear import RacLinearMethod, Shards

        bits = 8 if set(modules) <= set(self.int8_activations) else 16
        self.report.expected += 1
        return RacLinearMethod(Shards(prefix, modules, reader), self.report.add, bits)

    def _check_order(self, layer: Any, modules: list[str], reader: WeightReader) -> None:
        """Refuse rows that vLLM reorders in dense weights, and not in these (RacError)."""
        if self.reordered == _LLAMA4 and isinstance(reader, CodesReader) and reader.symmetric:
            return  # vLLM reorders weight_packed and weight_scale, too
        for module in modules:
            if module.rpartition(".")[2] in self.reordered and self.layout.holds(layer, module):
                raise RacError(
                    f"{module}: vLLM reorders its rows while it loads dense weights, and not those "
                    "of this checkpoint; rac unpack writes it dense, and "
                    "--quantization compressed-tensors serves codes"
                )

    def _experts(self, layer: Any, prefix: str) -> QuantizeMethodBase | None:
        reader = self.layout.experts_reader(layer, prefix)
        if reader is None or isinstance(reader, str):
            return self._vllms(layer, prefix, reader)
        from rac_modifier.vllm_plugin.experts import RacExpertsMethod

        self.report.expected += 1
        return RacExpertsMethod(layer, prefix, reader, self.report.add)

    def _vocabulary(self, layer: Any, prefix: str) -> QuantizeMethodBase | None:
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        from rac_modifier.vllm_plugin.vocabulary import VocabularyMethod

        is_head = isinstance(layer, ParallelLMHead)
        reader = self.layout.vocabulary_reader(layer, prefix)
        if reader is not None:
            self.embedding_is_stored |= not is_head
            return VocabularyMethod(prefix, reader)
        method = self._vllms(layer, prefix)
        if method is None and is_head and self.embedding_is_stored:
            return VocabularyMethod(prefix, None)  # the head may be tied to it
        return method

    def _vllms(
        self, layer: torch.nn.Module, prefix: str, reason: str | None = None
    ) -> QuantizeMethodBase | None:
        """Return vLLM's own method, if any; `reason`: why no kernel of ours runs the layer."""
        inner = self.layout.inner
        if reason is not None:
            self.report.expected += 1
            decision = stay_dense(reason, torch.get_default_dtype(), VLLMS)
            self.report.decisions[prefix] = decision
        return None if inner is None else inner.get_quant_method(layer, prefix)

    def get_name(self) -> str:
        """Return the method's name."""
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Return the dtypes of activations."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Accept any GPU: layers run dense there, and the log has the reason."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Name no files: without a `quantization_config` vLLM makes an empty config."""
        return []

    @staticmethod
    def get_checkpoint_weight_mapper() -> "WeightsMapper":
        """Pass on `g_idx`, the column order of GPTQ, which vLLM's own mapper drops."""
        from vllm.model_executor.models.utils import WeightsMapper

        return WeightsMapper()


def _runs_codes(quantization: dict[str, Any]) -> bool:
    """Return whether a kernel on this CPU reads dense weights of a `quantization_config`."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() or support().isa is None:
        return False
    try:
        RacConfig.from_config(quantization)
    except RacError:
        return False
    return True
