"""What config.json says about sparsity: reader and writers of its two entries.

`quantization_config.sparsity_config` means packed weights. `quant_method` next to it is
"compressed-tensors", with which transformers and vLLM without this package refuse it. "rac" is
read too, and not written: transformers only warns of a method that it does not know, and then
starts the weights at random. Nothing else reads our own entry, `rac_sparsity`: the mask structure
of each pruned module, packed or stored dense, and the modules with activations in 8 bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from rac_modifier.checkpoint.files import CONFIG_FILE as CONFIG_FILE
from rac_modifier.checkpoint.formats import FORMAT_24
from rac_modifier.checkpoint.stored_weight import UNSTRUCTURED
from rac_modifier.errors import RacError
from rac_modifier.settings.check import check_names

QUANTIZATION_KEY = "quantization_config"
RAC_KEY = "rac_sparsity"
METHOD = "compressed-tensors"
RAC_METHOD = "rac"  # of packed checkpoints, which are read under both names
VERSION = 1  # of the packed layouts; raised with every change that an older reader would misread

_EXPECTED = {
    "format": "which cannot be read; known are sparse-24-bitmask and sparse-bitmask",
    "targets": "not a list of module names",
    "ignore": "not a list of module names",
    "modules": "not an object with the mask structure of each module",
    "int8_activations": "not a list of module names",
}


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True)

    @classmethod
    def _read(cls, value: object, key: str) -> Self:
        if not isinstance(value, Mapping):
            raise RacError(
                f"{CONFIG_FILE}: {key} is {value!r}, not an object; save the model again"
            )
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            first = error.errors()[0]
            field = str(first["loc"][0])
            if first["type"] == "value_error":  # of a validator below
                problem = str(first["ctx"]["error"])
            else:
                problem = f"is {value.get(field)!r}, {_EXPECTED.get(field, first['msg'])}"
            step = "pip install -U rac-modifier" if field == "version" else "save the model again"
            raise RacError(f"{CONFIG_FILE}: {key}.{field} {problem}; {step}") from error


class SparsityConfig(_Entry):
    """`sparsity_config`: the weights are packed, in which format, and which linear modules are.

    `targets` and `ignore` hold module names, patterns ("re:...") or, as compressed-tensors has
    it, "Linear" for all. Entries of older compressed-tensors versions that mean nothing here
    are skipped.
    """

    version: int = VERSION  # not written while it is 1
    format: Literal["sparse-24-bitmask", "sparse-bitmask"]
    sparsity_structure: str = UNSTRUCTURED
    global_sparsity: float = 0.0
    targets: tuple[str, ...] = ("Linear",)
    ignore: tuple[str, ...] = ()

    @classmethod
    def of(cls, quantization: object) -> Self | None:
        """Return the sparsity of a `quantization_config` (any value); None: nothing is packed.

        Raises:
            RacError: a malformed sparsity_config, or a format that cannot be read here.
        """
        if not isinstance(quantization, Mapping):
            return None
        if quantization.get("quant_method", METHOD) not in (METHOD, RAC_METHOD):
            return None
        sparsity = quantization.get("sparsity_config")
        if not sparsity or (isinstance(sparsity, Mapping) and sparsity.get("format") == "dense"):
            return None
        return cls._read(sparsity, "sparsity_config")

    @field_validator("version")
    @classmethod
    def _not_newer(cls, version: int) -> int:
        if not 1 <= version <= VERSION:
            raise ValueError(
                f"is {version}, and this rac-modifier reads versions up to {VERSION}: a newer "
                "one wrote it"
            )
        return version

    @field_validator("targets", "ignore", mode="before")
    @classmethod
    def _null_is_the_default(cls, value: object, info: Any) -> object:
        return cls.model_fields[info.field_name].default if value is None else value

    @field_validator("targets", "ignore")
    @classmethod
    def _patterns_end(cls, entries: tuple[str, ...]) -> tuple[str, ...]:
        check_names(entries, "has a name")
        return entries


class SparsityRecord(_Entry):
    """`rac_sparsity`: how pruned weights are stored, and the mask structure of each module.

    `int8_activations`: quantized modules whose inputs may be rounded to 8 bits, as `rac
    activations` found.
    """

    storage: Literal["packed", "dense"] = "packed"
    modules: dict[str, str] = {}
    int8_activations: tuple[str, ...] = ()

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Self:
        """Return the record of a parsed config.json; without modules for a foreign model.

        Raises:
            RacError: a malformed entry.
        """
        return cls._read(config.get(RAC_KEY) or {}, RAC_KEY)


def packed_format(config: Mapping[str, Any]) -> str | None:
    """The format that the weights are packed in, None where they are dense.

    Raises:
        RacError: a malformed sparsity_config, or a format that cannot be read here.
    """
    sparsity = SparsityConfig.of(config.get(QUANTIZATION_KEY))
    return None if sparsity is None else sparsity.format


def ignored_modules(config: Mapping[str, Any]) -> set[str]:
    """Return the modules that sparsity_config lists as left dense."""
    sparsity = SparsityConfig.of(config.get(QUANTIZATION_KEY))
    return set() if sparsity is None else set(sparsity.ignore)


def recorded_structures(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the mask structure by module in `rac_sparsity`; {} for a foreign model."""
    return SparsityRecord.of(config).modules


def check_method(config: Mapping[str, Any]) -> None:
    """Refuse a model that is quantized by another method than compressed-tensors.

    Raises:
        RacError: naming the method.
    """
    quantization = config.get(QUANTIZATION_KEY) or {}
    is_object = isinstance(quantization, dict)
    method = quantization.get("quant_method", METHOD) if is_object else quantization
    if not is_object or method != METHOD:
        raise RacError(
            f"{CONFIG_FILE}: quantized by {method!r}; only compressed-tensors checkpoints can "
            "be packed"
        )


def with_packed(
    config: dict[str, Any],
    format: str,
    structures: dict[str, str],
    global_sparsity: float,
    ignore: list[str],
) -> dict[str, Any]:
    """Return a copy of the config for packed weights; what quantization wrote there is kept.

    `global_sparsity` is the share of zeros in the packed modules.

    Raises:
        RacError: the model is quantized by another method.
    """
    check_method(config)
    before = config.get(QUANTIZATION_KEY) or {"format": "dense"}
    sparsity = SparsityConfig.model_validate(
        {
            "format": format,
            "sparsity_structure": "2:4" if format == FORMAT_24 else UNSTRUCTURED,
            "global_sparsity": round(global_sparsity, 6),
            "ignore": sorted(ignore),
        }
    )
    quantization = {
        **before,
        "quant_method": METHOD,
        "sparsity_config": sparsity.model_dump(mode="json", exclude={"version"}),
    }
    return {**config, QUANTIZATION_KEY: quantization, **_record("packed", structures)}


def with_dense_mark(config: dict[str, Any], structures: dict[str, str]) -> dict[str, Any]:
    """Return a copy of the config for sparse weights that are stored dense."""
    marked = {**config, **_record("dense", structures)}
    if isinstance(config.get(QUANTIZATION_KEY), dict):
        quantization = without_sparsity(marked.pop(QUANTIZATION_KEY))
        if quantization is not None:
            marked[QUANTIZATION_KEY] = quantization
    return marked


def with_int8_activations(config: dict[str, Any], modules: Iterable[str]) -> dict[str, Any]:
    """Return a copy of a config in which these modules have inputs of 8 bits, and no other one.

    A config without `rac_sparsity` (dense weights of few bits, not pruned) gets one, which goes
    again with the last name.
    """
    names = sorted(modules)
    before = config.get(RAC_KEY) or {"storage": "dense", "modules": {}}
    record = {key: value for key, value in before.items() if key != "int8_activations"}
    if names:
        return {**config, RAC_KEY: {**record, "int8_activations": names}}
    others = {key: value for key, value in config.items() if key != RAC_KEY}
    return {**others, RAC_KEY: record} if record.get("modules") else others


def _record(storage: Literal["packed", "dense"], structures: dict[str, str]) -> dict[str, Any]:
    record = SparsityRecord(storage=storage, modules=structures)
    return {RAC_KEY: record.model_dump(mode="json", exclude={"int8_activations"})}


def without_sparsity(quantization: dict[str, Any]) -> dict[str, Any] | None:
    """Return a quantization_config for dense weights; None if it held only sparsity."""
    method = quantization.get("quant_method")
    if method not in (METHOD, RAC_METHOD):
        return quantization
    others = {key: value for key, value in quantization.items() if key != "sparsity_config"}
    if not any(others.get(key) for key in ("config_groups", "kv_cache_scheme", "transform_config")):
        return None
    return {**others, "quant_method": METHOD}
