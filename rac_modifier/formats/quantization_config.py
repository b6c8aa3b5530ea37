"""What config.json says about sparsity and quantization: reader and writers of its two entries.

`quantization_config.sparsity_config` means packed weights. `quant_method` next to it is
"compressed-tensors", which vLLM without this package refuses. transformers without it refuses
`REFUSAL`; without that, 5.23 and later would only warn, and start the weights at random. Our own
entry is `rac_sparsity`: the mask structure of each pruned module, and the modules with 8-bit
activations.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self, TypeVar

from pydantic import BaseModel, Field, ValidationError, field_validator

from rac_modifier.errors import RacError
from rac_modifier.formats.encoding import Encoding
from rac_modifier.runtime.files import CONFIG_FILE as CONFIG_FILE
from rac_modifier.settings.check import check_names

QUANTIZATION_KEY = "quantization_config"
RAC_KEY = "rac_sparsity"
COMPRESSED_TENSORS = "compressed-tensors"  # the method that our entries extend
FORMAT_24, FORMAT_BITMASK = "sparse-24-bitmask", "sparse-bitmask"
PACK_QUANTIZED = "pack-quantized"
REFUSAL = {"packed sparse: import rac_modifier": True}  # shown by pydantic up to 50 characters
BITS = (2, 3, 4)  # of dense weights that a kernel reads
TRANSFORMED = "its inputs or outputs are transformed"  # why none does
_GROUPED = ("group", "tensor_group")
_INT8_FORMATS = (PACK_QUANTIZED, "int-quantized", "naive-quantized")
VERSION = 1  # of the packed layouts; raised with every change that an older reader would misread


_Model = TypeVar("_Model", bound=BaseModel)


def parse_entries(model: type[_Model], value: object, key: str, step: str) -> _Model:
    """Validate what config.json has under `key` (RacError names the entry and its value)."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join([key, *map(str, first["loc"])])
        actual = "missing" if first["type"] == "missing" else f"{first['input']!r:.200}"
        if name == "sparsity_config.version":
            step = "a newer version wrote it: pip install -U rac-modifier"
        problem = first["msg"].removeprefix("Value error, ")
        raise RacError(f"{CONFIG_FILE}: {name} is {actual}: {problem}; {step}") from error


class SparsityConfig(BaseModel, frozen=True):
    """`sparsity_config`: the format of packed weights, and which linear modules are packed.

    `targets` and `ignore` hold module names, patterns ("re:...") or, as compressed-tensors has
    it, "Linear" for all. Other entries of older compressed-tensors versions are skipped.
    """

    version: int = Field(VERSION, ge=1, le=VERSION)  # not written while it is 1
    format: Literal["sparse-24-bitmask", "sparse-bitmask"]
    targets: tuple[str, ...] = ("Linear",)
    ignore: tuple[str, ...] = ()

    @classmethod
    def of(cls, quantization: object) -> Self | None:
        """Return the sparsity of a `quantization_config` (any value); None: nothing is packed."""
        if not isinstance(quantization, Mapping):
            return None
        if quantization.get("quant_method", COMPRESSED_TENSORS) != COMPRESSED_TENSORS:
            return None
        sparsity = quantization.get("sparsity_config")
        if not sparsity or (isinstance(sparsity, Mapping) and sparsity.get("format") == "dense"):
            return None
        return parse_entries(cls, sparsity, "sparsity_config", "save the model again")

    @field_validator("targets", "ignore", mode="before")
    @classmethod
    def _are_names(cls, entries: object, info: Any) -> object:
        entries = cls.model_fields[info.field_name].default if entries is None else entries
        check_names(entries, info.field_name)
        return entries


class SparsityRecord(BaseModel, frozen=True):
    """`rac_sparsity`: how pruned weights are stored, and the mask structure of each module.

    `int8_activations`: quantized modules whose inputs may be rounded to 8 bits.
    """

    storage: Literal["packed", "dense"] = "packed"
    modules: dict[str, str] = {}
    int8_activations: tuple[str, ...] = ()

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Self:
        """Return the record of a parsed config.json; without modules for a foreign model."""
        return parse_entries(cls, config.get(RAC_KEY) or {}, RAC_KEY, "save the model again")


def packed_format(config: Mapping[str, Any]) -> str | None:
    """Return the format that the weights are packed in, None where they are dense."""
    sparsity = SparsityConfig.of(config.get(QUANTIZATION_KEY))
    return None if sparsity is None else sparsity.format


def check_method(config: Mapping[str, Any]) -> None:
    """Refuse a model that is quantized by another method than compressed-tensors (RacError)."""
    quantization = config.get(QUANTIZATION_KEY) or {}
    is_object = isinstance(quantization, dict)
    method = quantization.get("quant_method", COMPRESSED_TENSORS) if is_object else quantization
    if not is_object or method != COMPRESSED_TENSORS:
        raise RacError(
            f"{CONFIG_FILE}: quantized by {method!r}; only compressed-tensors models can be packed"
        )


def with_packed(
    config: dict[str, Any], format: str, structures: dict[str, str], ignore: Iterable[str]
) -> dict[str, Any]:
    """Return a copy of the config for packed weights; what quantization wrote there is kept."""
    check_method(config)
    quantization = {
        **(config.get(QUANTIZATION_KEY) or {"format": "dense"}),
        "quant_method": COMPRESSED_TENSORS,
        "sparsity_config": {"format": format, "targets": ["Linear"], "ignore": sorted(ignore)},
    }
    quantized = quantization.get("config_groups") or quantization.get("kv_cache_scheme")
    quantization["global_compression_ratio" if quantized else "kv_cache_scheme"] = REFUSAL
    record = {"storage": "packed", "modules": structures}
    return {**config, QUANTIZATION_KEY: quantization, RAC_KEY: record}


def without_sparsity(quantization: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a `quantization_config` without what packing wrote there."""
    return {
        key: None if value == REFUSAL else value
        for key, value in quantization.items()
        if key != "sparsity_config"
    }


def with_dense_mark(config: dict[str, Any], structures: dict[str, str]) -> dict[str, Any]:
    """Return a copy of the config for sparse weights that are stored dense."""
    marked = {**config, RAC_KEY: {"storage": "dense", "modules": structures}}
    quantization = config.get(QUANTIZATION_KEY)
    if isinstance(quantization, dict) and quantization.get("quant_method") == COMPRESSED_TENSORS:
        base = marked[QUANTIZATION_KEY] = without_sparsity(quantization)
        if not any(map(base.get, ("config_groups", "kv_cache_scheme", "transform_config"))):
            del marked[QUANTIZATION_KEY]  # it held only sparsity
    return marked


def with_int8_activations(config: dict[str, Any], modules: Iterable[str]) -> dict[str, Any]:
    """Return a copy of a config in which these modules have inputs of 8 bits, and no other one."""
    record = config.get(RAC_KEY) or {"storage": "dense", "modules": {}}
    return {**config, RAC_KEY: {**record, "int8_activations": sorted(modules)}}


class _Arguments(BaseModel, strict=True):
    """What compressed-tensors' QuantizationArgs hold of weights or activations."""

    num_bits: int = Field(8, ge=1, le=64)
    type: Literal["int", "float"] = "int"
    strategy: str | None = None
    group_size: int | None = Field(None, ge=-1, lt=1 << 31)
    symmetric: bool = True


class _Group(BaseModel):
    weights: _Arguments | None = None
    input_activations: _Arguments | None = None
    format: str | None = None
    targets: list[str] = []


class _Quantization(BaseModel):
    config_groups: dict[str, _Group] | None = None
    format: str | None = None
    transform_config: dict[str, Any] | None = None
    ignore: list[str] | None = None


@dataclass(frozen=True)
class WeightScheme:
    """How a config group stores weights: scales per `strategy`, tensors of a `format`."""

    encoding: Encoding
    strategy: str
    format: str
    activations: str | None = None

    @classmethod
    def of(cls, group: object, format: str | None) -> Self:
        """Read a config group with weights; `format`: of the checkpoint, for one without."""
        parsed = _Group.model_validate(group)
        weights, inputs = parsed.weights or _Arguments(), parsed.input_activations
        strategy = weights.strategy or ("group" if weights.group_size else "tensor")
        size = weights.group_size if strategy in _GROUPED else None
        scale: Literal["float", "e4m3", "e8m0"] = "float"
        if (weights.type, weights.num_bits) == ("float", 4):
            scale = "e4m3" if strategy == "tensor_group" else "e8m0"
        return cls(
            Encoding(weights.type, weights.num_bits, size, weights.symmetric, scale),
            strategy,
            str(parsed.format or format),
            f"{inputs.type}{inputs.num_bits} per {inputs.strategy}" if inputs else None,
        )

    def describe(self) -> str:
        """Describe the scheme in a few words, such as `int4 in groups of 128 (pack-quantized)`."""
        codes, scales = self.encoding, f"one scale per {self.strategy}"
        if self.strategy in _GROUPED:
            scales = f"in groups of {codes.group_size}"
        asymmetric = "" if codes.symmetric else ", asymmetric"
        text = f"{codes.kind}{codes.bits} {scales}{asymmetric} ({self.format})"
        return f"{text}, activations {self.activations}" if self.activations else text

    def why_no_kernel(self, vocabulary: bool = False) -> str | None:
        """Say why no kernel reads dense weights, of a head if `vocabulary`; None where one does."""
        codes = self.encoding
        if vocabulary and _is_int8(codes):
            if not codes.symmetric:
                return "its weights are asymmetric int8"
            if self.format not in _INT8_FORMATS:
                return f"its format is {self.format}"
            known = self.strategy in ("group", "channel", "tensor")
            return None if known else f"its scales are {self.strategy}"
        if codes.kind != "int" or codes.bits not in ((4,) if vocabulary else BITS):
            return f"its weights are {codes.kind}{codes.bits}"
        if self.activations is not None:
            return "its activations are quantized too"
        if self.format != PACK_QUANTIZED:
            return f"its format is {self.format}, not {PACK_QUANTIZED}"
        if self.strategy not in ("group", "channel"):
            return f"its scales are per {self.strategy}"
        return None


def weight_schemes(quantization: object) -> tuple[WeightScheme, ...]:
    """List the schemes of weights in a `quantization_config` (any value of a file)."""
    if not isinstance(quantization, Mapping) or not quantization.get("config_groups"):
        return ()
    step = "restore the config.json that was saved with the weights"
    parsed = parse_entries(_Quantization, quantization, QUANTIZATION_KEY, step)
    check_names(parsed.ignore or (), f"{CONFIG_FILE}: ignore of {QUANTIZATION_KEY}")
    schemes = []
    for name, group in (parsed.config_groups or {}).items():
        check_names(group.targets, f"{CONFIG_FILE}: targets of config group {name!r}")
        if group.weights is not None:
            schemes.append(WeightScheme.of(group, parsed.format))
    return tuple(dict.fromkeys(schemes))


def why_left_to_vllm(
    quantization: object, schemes: Iterable[WeightScheme], vocabulary: bool
) -> str | None:
    """Say why vLLM's own method runs dense codes of one of `schemes`; None where a kernel may.

    `vocabulary`: of a head or embedding. Of several schemes one that a kernel reads counts. Next
    to packed modules, codes of every scheme are read.
    """
    packed = SparsityConfig.of(quantization) is not None
    if packed and not vocabulary:
        return None
    if isinstance(quantization, Mapping) and quantization.get("transform_config") and not packed:
        return TRANSFORMED
    reasons = [scheme.why_no_kernel(vocabulary) for scheme in schemes]
    return None if None in reasons else next(iter(reasons), None)


def rotates_activations(quantization: Mapping[str, Any]) -> bool:
    """Tell whether inputs or outputs of layers are rotated while the model runs."""
    transforms = quantization.get("transform_config")
    if not transforms:
        return False
    from compressed_tensors.transform import TransformConfig, TransformLocation

    step = "restore the config.json that was saved with the weights"
    parsed = parse_entries(
        TransformConfig, transforms, f"{QUANTIZATION_KEY}.transform_config", step
    )
    schemes = parsed.config_groups.values()
    return any(TransformLocation(a.location).is_online() for s in schemes for a in s.apply)


def has_block_scales(schemes: Iterable[WeightScheme]) -> bool:
    """Tell whether scales may be per block of rows and columns."""
    return any(scheme.strategy == "block" for scheme in schemes)


def int8_in_words(schemes: Iterable[WeightScheme]) -> bool:
    """Tell whether upstream stores dense int8 weights in int32 words.

    RacError: both in words and as plain int8. Packed, both look the same.
    """
    formats = {scheme.format for scheme in schemes if _is_int8(scheme.encoding)}
    if PACK_QUANTIZED in formats and len(formats) > 1:
        raise RacError(
            f"int8 weights in formats {' and '.join(sorted(formats))} cannot be stored sparse "
            "together; quantize activations in all config groups or none, or set storage: dense"
        )
    return PACK_QUANTIZED in formats


def _is_int8(encoding: Encoding) -> bool:
    return (encoding.kind, encoding.bits) == ("int", 8)
