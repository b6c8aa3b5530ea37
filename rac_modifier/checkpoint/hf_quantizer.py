"""Load any checkpoint of this package, packed or not, as an ordinary transformers model with dense weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.utils import cached_file

from rac_modifier.checkpoint.files import TensorFiles
from rac_modifier.checkpoint.quantization_config import weight_schemes
from rac_modifier.checkpoint.record import read_json
from rac_modifier.checkpoint.sources import StoredTensor, dense_sources, iter_dense_tensors
from rac_modifier.checkpoint.sparsity_config import CONFIG_FILE, packed_format, without_sparsity
from rac_modifier.errors import RacError

__all__ = ["iter_dense_tensors", "load_model"]

_HUB_KWARGS = ("cache_dir", "revision", "token", "local_files_only")


def load_model(model: str | Path, *, trust_remote_code: bool = False, **from_pretrained_kwargs: Any) -> PreTrainedModel:
    """A causal LM, its packed weights (if it has any) unpacked to the very bits that were saved.

    A packed weight is read and unpacked when transformers asks for it, so the packed and the dense model are never both
    in memory. Ordinary checkpoints go to transformers as they are.

    Args:
        model: a local folder, or a model id of the Hugging Face hub.
        trust_remote_code: run model code that an ordinary checkpoint brings along.
        from_pretrained_kwargs: passed on: dtype, device_map, attn_implementation, revision, ...

    Raises:
        RacError: a missing or damaged file or tensor, or weights that do not fit the model. transformers would start
            those at random with a warning; here they are an error.

    Example:
        model = load_model("Qwen3-8B-rac-2of4", dtype="auto", device_map="auto")
    """
    kwargs = from_pretrained_kwargs
    if not Path(model).is_dir():
        if str(model).count("/") != 1 or str(model)[0] in "./~":  # no hub id: say so at once, without the network
            raise RacError(f"{model}: no such folder; give the folder of a saved model, or a hub id as owner/name")
        hub = {key: kwargs[key] for key in _HUB_KWARGS if key in kwargs}
        if packed_format(read_json(_from_hub(str(model), CONFIG_FILE, hub))) is None:
            return _checked(AutoModelForCausalLM, str(model), str(model), trust_remote_code=trust_remote_code, **kwargs)
        model = _snapshot(str(model), hub)
    folder = Path(model)
    with TensorFiles(folder) as files:
        raw = read_json(folder / CONFIG_FILE)
        sources = dense_sources(files, packed_format(raw), weight_schemes(raw))
        if packed_format(raw) is None:
            return _checked(AutoModelForCausalLM, str(folder), folder, trust_remote_code=trust_remote_code, **kwargs)
        return _load_packed(folder, raw, sources, kwargs)


def _load_packed(
    folder: Path, raw: dict[str, Any], sources: dict[str, StoredTensor], kwargs: dict[str, Any]
) -> PreTrainedModel:
    if raw.get("auto_map"):
        raise RacError(
            f"{folder}: brings model code of its own (auto_map), which packed weights cannot be loaded into; "
            "save this model with storage: dense"
        )
    config = AutoConfig.from_pretrained(folder)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise RacError(f"{folder}: model_type {raw.get('model_type')!r} is no causal LM of transformers")
    quantization = without_sparsity(raw["quantization_config"])
    if quantization is None:
        del config.quantization_config
    else:
        config.quantization_config = quantization
    state = {name: _LazyTensor(source) for name, source in sources.items()}
    try:
        # By its own class, since AutoModel insists on a path.
        model = _checked(
            MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], None, folder, config=config, state_dict=state, **kwargs
        )
    finally:
        # transformers reads in threads and turns some of their errors into warnings: ours comes first.
        for tensor in state.values():
            if tensor.error is not None:
                raise tensor.error
    model.name_or_path = model.config._name_or_path = str(folder)
    if (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


class _LazyTensor:
    """What transformers takes for a slice of a safetensors file; keeps the error of a failed read.

    Of a state dict's values `from_pretrained` uses `[...]`, `get_shape` and `get_dtype` as a slice has them, and
    `is_floating_point` and `dtype` as a tensor has them.
    """

    def __init__(self, source: StoredTensor) -> None:
        self._source = source
        self.error: RacError | None = None

    def __getitem__(self, index: Any) -> Tensor:
        try:
            return self._source.read()[index]
        except RacError as error:
            self.error = error
            raise

    def get_shape(self) -> list[int]:
        return list(self._source.shape)

    def get_dtype(self) -> str:
        return self._source.dtype_name

    def is_floating_point(self) -> bool:
        return self._source.dtype.is_floating_point

    @property
    def dtype(self) -> torch.dtype:
        return self._source.dtype


def _checked(model_class: Any, path: str | None, shown: str | Path, **kwargs: Any) -> PreTrainedModel:
    """`from_pretrained`, with an error where it only warns that weights are missing or do not fit."""
    model, info = model_class.from_pretrained(path, output_loading_info=True, **kwargs)
    for kind, text in (
        ("missing_keys", "needed by the model but missing from"),
        ("mismatched_keys", "its shape does not fit the model's config.json in"),
        ("conversion_errors", "could not be loaded from"),
    ):
        found = sorted(str(key[0] if isinstance(key, tuple) else key) for key in info.get(kind) or ())
        if found:
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            raise RacError(f"{', '.join(found[:3])}{more}: {text} {shown}")
    return model


def _from_hub(model: str, file: str, hub: dict[str, Any]) -> str:
    try:
        found = cached_file(model, file, **hub)
    except (OSError, ValueError) as error:
        raise RacError(f"{model}: neither a folder nor a model that can be had from the hub ({error})") from error
    assert found is not None
    return found


def _snapshot(model: str, hub: dict[str, Any]) -> str:
    """Download (or find) the files of a packed model: none but config and weights, in the names that packing keeps."""
    from huggingface_hub import snapshot_download

    return str(snapshot_download(model, allow_patterns=["*.json", "model*.safetensors"], **hub))
