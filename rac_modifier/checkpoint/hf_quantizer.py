"""Packed checkpoints in transformers: `load_model`, and a quantizer for `from_pretrained`.

`from_pretrained` gets the tensors of the dense checkpoint, each unpacked when transformers takes
it. Importing this module replaces transformers' entry for "compressed-tensors" by a subclass,
which loads a checkpoint without a `sparsity_config` as before. Nothing of
`transformers.modeling_utils` may be imported here: this module is imported while that one is.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers.quantizers import auto
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer
from transformers.utils import quantization_config as upstream

from rac_modifier.checkpoint.files import TensorFiles
from rac_modifier.checkpoint.formats import PackedFiles
from rac_modifier.checkpoint.output_folder import check_is_id
from rac_modifier.errors import RacError
from rac_modifier.formats.quantization_config import (
    COMPRESSED_TENSORS,
    CONFIG_FILE,
    QUANTIZATION_KEY,
    RAC_KEY,
    SparsityConfig,
    rotates_activations,
    weight_schemes,
    without_sparsity,
)
from rac_modifier.formats.stored_weight import FLOATS
from rac_modifier.formats.words import WORDS, WORDS_SHAPE
from rac_modifier.runtime.files import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_MISMATCHES = (
    ("mismatched_keys", "its shape does not fit the model's config.json in"),
    ("missing_keys", "needed by the model but missing from"),
    ("unexpected_keys", "not a tensor of the model, but in"),
)


def load_model(
    model: str | Path, *, trust_remote_code: bool = False, **from_pretrained_kwargs: Any
) -> "PreTrainedModel":
    """Load a model as `AutoModelForCausalLM.from_pretrained` does, packed or not, but strictly.

    Args:
        model: a local folder, or a model id of the Hugging Face hub.
        trust_remote_code: run model code that the checkpoint contains.
        from_pretrained_kwargs: passed on: dtype, device_map, attn_implementation, revision, ...

    Raises:
        RacError: a missing or damaged file or tensor, or tensors that are not the model's.
            transformers starts a missing weight at random with a warning; here it is an error.

    Example:
        model = load_model("Qwen3-8B-rac-2of4", dtype="auto", device_map="auto")
    """
    from transformers import AutoModelForCausalLM, PreTrainedConfig

    config: dict[str, Any] = {}
    if local := Path(model).is_dir():
        with TensorFiles(model) as files:
            config = read_json(Path(model) / CONFIG_FILE)
            PackedFiles(files, config).check_words()  # upstream would read them unchecked
    else:
        check_is_id(model)
    try:
        if not local:
            config, _ = PreTrainedConfig.get_config_dict(str(model), **from_pretrained_kwargs)
        if rotates_activations(config.get(QUANTIZATION_KEY) or {}):
            raise RacError(
                f"{model}: its config.json has rotations of activations (QuIPModifier, or R3 and "
                "R4 of SpinQuantModifier), which transformers does not apply; serve it with vLLM"
            )
        loading: Any = AutoModelForCausalLM.from_pretrained(
            str(model),
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **from_pretrained_kwargs,
        )
    except (RacError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # transformers has many for config.json alone
        fault, text = "cannot be loaded", " ".join(str(error).split())
        if isinstance(error, OSError) and not local:
            fault = "neither a folder nor a model that can be had from the hub"
        raise RacError(
            f"{model}: {fault} ({type(error).__name__}: {text}); compare its config.json and "
            "index with those that were saved with the weights"
        ) from error
    loaded, info = loading
    _check_complete(info, model)
    return cast("PreTrainedModel", loaded)


class CompressedTensorsConfig(upstream.CompressedTensorsConfig):
    """Upstream's config, and name, with the `sparsity` of a packed checkpoint."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.sparsity = SparsityConfig.of(kwargs)
        if self.sparsity is not None:
            weight_schemes(kwargs)  # before upstream matches the patterns in it
            kwargs = without_sparsity(kwargs)
        super().__init__(*args, **kwargs)

    def post_init(self) -> None:
        """Treat a packed model that is not quantized as an ordinary one once it is loaded."""
        if self.sparsity is not None and not self.is_quantized:
            self.dequantize = True
        super().post_init()


class SparseHfQuantizer(CompressedTensorsHfQuantizer):
    """Loads packed sparse checkpoints, also quantized ones, and all others as upstream does.

    `save_pretrained` of the loaded model writes it dense, and marks it so in `rac_sparsity`.
    """

    def __init__(self, quantization_config: CompressedTensorsConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._sparsity: SparsityConfig | None = getattr(quantization_config, "sparsity", None)
        # upstream has nothing to do then
        self._only_packed = self._sparsity is not None and not quantization_config.is_quantized

    def _process_model_before_weight_loading(self, model: "PreTrainedModel", **kwargs: Any) -> None:
        if not self._only_packed:
            super()._process_model_before_weight_loading(model, **kwargs)
        if self._sparsity is None:
            return
        if not kwargs.get("checkpoint_files"):
            raise RacError(
                "packed weights are read from files: give a folder or a hub id, not a state_dict"
            )
        if getattr(model.config, "distributed_config", None) is not None:
            raise RacError("packed weights cannot be sharded while loaded; set storage: dense")
        _extend_loading()

    def update_weight_conversions(self, weight_conversions: list[Any], *model: Any) -> list[Any]:
        """Return the conversions of dense weights; transformers passes the model from 5.21 on."""
        update = super().update_weight_conversions
        return weight_conversions if self._only_packed else list(update(weight_conversions, *model))

    def load_packed(
        self, load: Callable[..., Any], model: Any, files: list[str], config: Any, *rest: Any
    ) -> Any:
        """Call transformers' `load` with the dense tensors (RacError: they are not the model's)."""
        assert self._sparsity is not None
        folder = Path(files[0]).parent
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        if self._only_packed:
            config = replace(config, hf_quantizer=None)
        with TensorFiles(folder) as tensor_files:
            packed = PackedFiles(tensor_files, read_json(folder / CONFIG_FILE))
            state_dict = _dense_state_dict(packed)
            loaded = load(model, state_dict, files, config, *rest)
        info = loaded[0]
        for name, text in sorted(info.conversion_errors.items()):
            raise RacError(f"{name}: cannot be loaded ({text.strip().splitlines()[-1]})")
        # with a quantizer, transformers compares no shapes until 5.22
        state = model.state_dict().items()
        misfits = {name for name, tensor in state if tensor.shape != shapes[name]}
        keys = {"mismatched_keys": {*info.mismatched_keys, *misfits}}
        if type(model).__name__ in (model.config.architectures or ()):
            model._adjust_missing_and_unexpected_keys(info)
            keys["missing_keys"] = info.missing_keys - model.all_tied_weights_keys.keys()
            keys["unexpected_keys"] = info.unexpected_keys
        _check_complete(keys, folder)
        return loaded

    def _process_model_after_weight_loading(self, model: "PreTrainedModel", **kwargs: Any) -> None:
        record = getattr(model.config, RAC_KEY, None)
        if self._sparsity is not None and isinstance(record, dict):
            setattr(model.config, RAC_KEY, {**record, "storage": "dense"})
        super()._process_model_after_weight_loading(model, **kwargs)


@cache
def _extend_loading() -> None:
    """Have `from_pretrained` read packed files through their quantizer, which gets no tensors.

    Contract: test_seam_a_state_dict_is_indexed_like_slices_of_files
    Until: a quantizer can say how the tensors of files are read.
    """
    from transformers.modeling_utils import PreTrainedModel

    inner = PreTrainedModel._load_pretrained_model

    @wraps(inner)
    def load(
        model: Any,
        state_dict: Any,
        checkpoint_files: Any,
        load_config: Any,
        expected_keys: Any = None,
    ) -> Any:
        quantizer = load_config.hf_quantizer
        if state_dict is None and getattr(quantizer, "_sparsity", None) is not None:
            return quantizer.load_packed(inner, model, checkpoint_files, load_config, expected_keys)
        return inner(model, state_dict, checkpoint_files, load_config, expected_keys)

    PreTrainedModel._load_pretrained_model = staticmethod(load)  # type: ignore[method-assign]


@dataclass(frozen=True)
class _LazyTensor:
    """A tensor that is read when transformers indexes it, as it does with safetensors' slices."""

    read: Callable[[], Tensor]
    dtype_name: str

    def __getitem__(self, index: Any) -> Tensor:
        return self.read()[index]

    def get_dtype(self) -> str:
        return self.dtype_name


def _dense_state_dict(packed: PackedFiles) -> dict[str, _LazyTensor]:
    """Return the tensors of the dense checkpoint that was packed."""
    files, parts = packed.files, packed.format.parts if packed.format else ()
    replaced = {f"{module}.{part}" for module in packed.modules for part in parts}

    def weight(module: str, part: str) -> Tensor:
        return packed.dense(module)[part]

    def shape(module: str) -> Tensor:
        return files.tensor(f"{module}.shape").flatten()

    state = {}
    for name in files.where.keys() - replaced:
        state[name] = _LazyTensor(partial(files.tensor, name), files.dtype_name(name))
    for module in packed.modules:
        compressed = f"{module}.compressed"
        if files.dtype(compressed) not in FLOATS:
            packed.check_schemes(compressed)
        if packed.in_words(module):
            state[f"{module}.{WORDS}"] = _LazyTensor(partial(weight, module, WORDS), "I32")
            state[f"{module}.{WORDS_SHAPE}"] = _LazyTensor(partial(shape, module), "I64")
        else:
            dense = partial(weight, module, "weight")
            state[f"{module}.weight"] = _LazyTensor(dense, files.dtype_name(compressed))
    return state


def _check_complete(info: Mapping[str, Iterable[Any]], folder: str | Path) -> None:
    """Refuse a checkpoint with missing, unexpected or mismatched keys in transformers' `info`."""
    for kind, text in _MISMATCHES:
        keys = (key[0] if isinstance(key, tuple) else key for key in info.get(kind, ()))
        if names := sorted(map(str, keys)):
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise RacError(f"{', '.join(names[:3])}{more}: {text} {folder}")


auto.AUTO_QUANTIZATION_CONFIG_MAPPING[COMPRESSED_TENSORS] = CompressedTensorsConfig
auto.AUTO_QUANTIZER_MAPPING[COMPRESSED_TENSORS] = SparseHfQuantizer
