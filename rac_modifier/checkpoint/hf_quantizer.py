"""Packed checkpoints in transformers: `load_model`, and a quantizer for `from_pretrained`.

The packed tensors of a module are freed before the next module is unpacked, so a load takes the
memory of the dense model and of one module. Importing this module replaces transformers' entry
for "compressed-tensors" by a subclass of it, which loads a checkpoint without a
`sparsity_config` as before.

Nothing of `transformers.modeling_utils` may be imported here: this module is imported while
that one is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    build_glob_alternation,
    rename_source_key,
)
from transformers.quantizers import auto
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer
from transformers.utils import quantization_config as upstream

from rac_modifier.checkpoint.files import TensorFiles
from rac_modifier.checkpoint.formats import check_packed, check_scale_of, packed_modules
from rac_modifier.checkpoint.output_folder import check_is_id
from rac_modifier.checkpoint.quantization_config import (
    CONFIG_FILE,
    METHOD,
    RAC_KEY,
    RAC_METHOD,
    SparsityConfig,
    packed_format,
    weight_schemes,
)
from rac_modifier.checkpoint.weight_conversion import (
    Unpack,
    conversions_for_saving,
    misfit,
    updated_conversions,
)
from rac_modifier.errors import RacError
from rac_modifier.files import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_MISMATCHES = (
    ("mismatched_keys", "its shape does not fit the model's config.json in"),
    ("missing_keys", "needed by the model but missing from"),
    ("unexpected_keys", "not a tensor of the model, but in"),
)


def load_model(
    model: str | Path, *, trust_remote_code: bool = False, **from_pretrained_kwargs: Any
) -> PreTrainedModel:
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
    from transformers import AutoModelForCausalLM

    if local := Path(model).is_dir():
        with TensorFiles(model) as files:
            config = read_json(Path(model) / CONFIG_FILE)
            check_packed(files, packed_format(config))
            _check_rotations(model, config)
    else:
        check_is_id(model)
    kwargs = {
        **from_pretrained_kwargs,
        "trust_remote_code": trust_remote_code,
        "ignore_mismatched_sizes": True,
    }
    try:
        loading: Any = AutoModelForCausalLM.from_pretrained(
            str(model), output_loading_info=True, **kwargs
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
    check_complete(info, model)
    return cast("PreTrainedModel", loaded)


def _check_rotations(model: str | Path, config: Mapping[str, Any]) -> None:
    """Refuse rotations of activations, which transformers 5.17 leaves out (RacError)."""
    from compressed_tensors.transform import TransformConfig, TransformLocation

    settings = config.get("quantization_config")
    transforms = settings.get("transform_config") if isinstance(settings, Mapping) else None
    if not transforms:
        return
    try:
        schemes = TransformConfig.model_validate(transforms).config_groups.values()
    except ValueError as error:
        raise RacError(f"{model}: transform_config of its config.json: {error}") from error
    if any(TransformLocation(a.location).is_online() for s in schemes for a in s.apply):
        raise RacError(
            f"{model}: its config.json has rotations of activations (QuIPModifier, or R3 and R4 of "
            "SpinQuantModifier), which transformers does not apply; serve it with vLLM"
        )


class CompressedTensorsConfig(upstream.CompressedTensorsConfig):
    """Upstream's config and, of a packed checkpoint, its `sparsity`.

    The name is upstream's: transformers compares it with the class name of a
    `quantization_config` that the user gives.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.sparsity = SparsityConfig.of(kwargs)
        if self.sparsity is not None:
            weight_schemes(kwargs)  # before upstream matches the patterns in it
            del kwargs["sparsity_config"]
        elif kwargs.get("quant_method") == RAC_METHOD:
            raise RacError(
                "config.json: quantization_config has no sparsity_config; restore the "
                "config.json that was saved with the weights"
            )
        if kwargs.get("quant_method") == RAC_METHOD:  # to upstream it is a model of its own
            kwargs["quant_method"] = METHOD
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
        self._unpack: Unpack | None = None
        self._int32_modules: list[str] = []
        self._misfits: dict[str, RacError] = {}

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """Check what the headers of the files show before a weight is read (RacError)."""
        if self._sparsity is None or self.quantization_config.is_quantized:
            super()._process_model_before_weight_loading(model, **kwargs)
        if self._sparsity is None:
            return
        if not kwargs.get("checkpoint_files"):
            raise RacError(
                "packed weights are read from files: give from_pretrained a folder or a hub "
                "id, not a state_dict"
            )
        if getattr(model.config, "distributed_config", None) is not None:
            raise RacError(
                "packed weights cannot be sharded while they are loaded; save the model with "
                "storage: dense"
            )
        self._unpack = Unpack(self._sparsity.format, dtypes_to_load(model))
        groups = self.quantization_config.quantization_config
        schemes = weight_schemes(groups.model_dump(mode="json")) if groups is not None else ()
        with TensorFiles(Path(kwargs["checkpoint_files"][0]).parent) as files:
            self._int32_modules = check_packed(files, self._sparsity.format, schemes)
            for module in packed_modules(files.where):
                shape = files.tensor(f"{module}.shape")
                if shape.dtype == torch.int64 and shape.numel() == 2:  # else `check` refuses it
                    rows, columns = shape.flatten().tolist()
                    check_scale_of(files, module, rows, columns, schemes)
            self._misfits = _misfits(files, model)
        _check_before_init(model, self._unpack, files.folder)

    def update_weight_conversions(
        self, weight_conversions: list[WeightTransform]
    ) -> list[WeightTransform]:
        """Return the model's conversions and ours for packed weights.

        Raises:
            RacError: a tensor has another shape than in the model, which no converter changes.
        """
        if self._unpack is None or self.quantization_config.is_quantized:
            weight_conversions = super().update_weight_conversions(weight_conversions)
        if self._unpack is None:
            return weight_conversions
        converters = [c for c in weight_conversions if isinstance(c, WeightConverter)]
        for name, error in self._misfits.items():
            if not any(c.compiled_sources.search(name) for c in converters):
                raise error
        renamings = [c for c in weight_conversions if isinstance(c, WeightRenaming)]
        int32_modules = [rename_source_key(name, renamings, [])[0] for name in self._int32_modules]
        return updated_conversions(weight_conversions, self._unpack, int32_modules)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """Leave an ordinary model."""
        if self._unpack is not None:
            loaded: Any = model  # whose attributes torch declares as tensors and modules
            loaded._weight_conversions = conversions_for_saving(loaded._weight_conversions or ())
            if isinstance(record := getattr(model.config, RAC_KEY, None), dict):
                setattr(model.config, RAC_KEY, {**record, "storage": "dense"})
            if not self.quantization_config.is_quantized:
                _cast_renamed(model, self._unpack.dtypes)
        super()._process_model_after_weight_loading(model, **kwargs)


def _check_before_init(model: PreTrainedModel, unpack: Unpack, folder: Path) -> None:
    """Have `model` raise what is wrong with the files before missing weights are drawn at random.

    The hook is the first method that transformers calls with the names of missing tensors.
    """
    loaded: Any = model
    mark = loaded.mark_tied_weights_as_initialized

    def checked(info: Any) -> None:
        del loaded.mark_tied_weights_as_initialized
        mark(info)
        if unpack.errors:
            raise unpack.errors[0]
        for name, text in sorted(info.conversion_errors.items()):
            raise RacError(f"{name}: cannot be loaded ({text.strip().splitlines()[-1]})")
        if type(model).__name__ in (model.config.architectures or ()):
            loaded._adjust_missing_and_unexpected_keys(info)
            check_complete(
                {
                    "mismatched_keys": info.mismatched_keys,
                    "missing_keys": info.missing_keys - loaded.all_tied_weights_keys.keys(),
                    "unexpected_keys": info.unexpected_keys,
                },
                folder,
            )

    loaded.mark_tied_weights_as_initialized = checked


def check_complete(info: Mapping[str, Iterable[Any]], folder: str | Path) -> None:
    """Refuse a checkpoint with missing, unexpected or mismatched keys in transformers' `info`."""
    for kind, text in _MISMATCHES:
        if names := sorted(str(key[0] if isinstance(key, tuple) else key) for key in info[kind]):
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise RacError(f"{', '.join(names[:3])}{more}: {text} {folder}")


def dtypes_to_load(model: PreTrainedModel) -> dict[str, torch.dtype]:
    """Return the dtype to load each tensor of an empty model in; modules may stay in float32."""
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    loaded_in = model.config.dtype
    assert isinstance(loaded_in, torch.dtype)
    if plan := model._get_dtype_plan(loaded_in):
        pattern, names, _ = build_glob_alternation(list(plan))
        for name, dtype in dtypes.items():
            if dtype.is_floating_point and (match := pattern.search(name)) is not None:
                dtypes[name] = plan[names[match.lastgroup or ""]]
    return dtypes


def _misfits(files: TensorFiles, model: PreTrainedModel) -> dict[str, RacError]:
    """Return an error per weight and bias of another shape: transformers compares none here."""
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items() if name in files}
    return {
        name: misfit(name, files.shape(name), shape)
        for name, shape in shapes.items()
        if name.endswith((".weight", ".bias")) and files.shape(name) != tuple(shape)
    }


@torch.no_grad()
def _cast_renamed(model: PreTrainedModel, dtypes: Mapping[str, torch.dtype]) -> None:
    """Cast the tensors that transformers renamed and left in the dtype of the file."""
    for name, parameter in model.named_parameters():
        if name in dtypes and not parameter.is_meta and parameter.dtype != dtypes[name]:
            parameter.data = parameter.data.to(dtypes[name])


auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = CompressedTensorsConfig
auto.AUTO_QUANTIZATION_CONFIG_MAPPING[RAC_METHOD] = CompressedTensorsConfig
auto.AUTO_QUANTIZER_MAPPING[METHOD] = SparseHfQuantizer
