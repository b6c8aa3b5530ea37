"""Dense weights of GPTQ (2, 3, 4 and 8 bits) and AWQ checkpoints (4 bits), checked.

Both hold the transposed weight: K input columns by N output rows. A weight is (code - code of zero)
* scale. GPTQ packs codes along K, bit after bit; AWQ packs eight 4-bit codes of a column
along N, in the order 0 2 4 6 1 3 5 7. Codes of zero are packed along N in the same way.
Format 1 of GPTQ stores them minus one, format 2 (`gptq_v2`) as they are.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, field_validator
from torch import Tensor

from rac_modifier.errors import RacError
from rac_modifier.formats.bitmask import contradicts, damaged, part_of
from rac_modifier.formats.quantization_config import parse_entries
from rac_modifier.formats.stored_weight import FLOATS, StoredWeight
from rac_modifier.formats.words import unpack_words, with_zeros, word_count
from rac_modifier.settings.check import check_names

WORDS, ZEROS, SCALES, ORDER = "qweight", "qzeros", "scales", "g_idx"
PARTS = (WORDS, ZEROS, SCALES, ORDER)
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # where each of eight neighbouring codes lies in a word
# What format 1 has less in each word of codes of zero.
_SUBTRACTED = {2: 0x55555555, 4: 0x11111111}
_STEP = "leave out --quantization rac, or restore the config.json that was saved with these files"


class _Entries(BaseModel):
    """Entries of `quantization_config`, each checked."""

    model_config = ConfigDict(strict=True, frozen=True)

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Self:
        """Parse a `quantization_config` (RacError: an entry is missing or malformed)."""
        return parse_entries(cls, config, "quantization_config", _STEP)

    @field_validator("group_size", check_fields=False)
    @classmethod
    def _at_least_1(cls, size: int | None) -> int | None:
        if size is not None and size != -1 and size < 1:
            raise ValueError("must be a number of columns, or -1 for one scale per row")
        return size


class _GptqRule(_Entries):
    """A dynamic rule of GPTQModel: what differs in the modules that match its pattern."""

    bits: Literal[2, 3, 4, 8] | None = None
    group_size: int | None = None
    sym: bool | None = None
    desc_act: bool | None = None


class Gptq(_Entries):
    """The format GPTQ: the entries of config.json that weights are read by, and their check."""

    method: ClassVar[str] = "gptq"
    bits: Literal[2, 3, 4, 8]
    group_size: int
    sym: bool
    desc_act: bool | None = None
    lm_head: bool | None = None
    dynamic: dict[str, _GptqRule] | None = None
    is_marlin_format: Literal[False] | None = None
    checkpoint_format: Literal["gptq", "gptq_v2"] = Field(
        "gptq", validation_alias=AliasChoices("checkpoint_format", "format")
    )

    @field_validator("dynamic")
    @classmethod
    def _patterns_end(cls, rules: dict[str, _GptqRule] | None) -> dict[str, _GptqRule] | None:
        patterns = [rule.removeprefix("-:").removeprefix("+:") for rule in rules or {}]
        check_names([f"re:{pattern}" for pattern in patterns], "has a rule")
        return rules

    def of_module(self, module: str) -> Self:
        """Return the entries of a module: the first match counts; "-:" rules name floats."""
        for pattern, rule in (self.dynamic or {}).items():
            if not pattern.startswith("-:") and re.match(pattern.removeprefix("+:"), module):
                return self.model_copy(update=rule.model_dump(exclude_none=True))
        return self

    def check(self, tensors: Mapping[str, Tensor], name: str) -> StoredWeight:
        """Check the tensors of a module as untrusted input; return its weight, all stored.

        `tensors`: `qweight` int32 [K bits / 32, N], `qzeros` int32 [K / group, N bits / 32],
        `scales` [K / group, N], and, if the writer stored it, `g_idx` [K], each column's group.
        RacError names `{name}.{part}`, which is missing, malformed or contradicts config.json.
        """
        entries = self.of_module(name)
        bits = entries.bits
        words = _words(tensors, name, WORDS)
        columns, rows = len(words) * 32 // bits, words.shape[1]
        if columns * bits != len(words) * 32:
            fault = f"{len(words)} words per row hold no whole number of {bits}-bit codes"
            raise contradicts(f"{name}.{WORDS}", fault)
        scale = _scales(tensors, name, entries.group_size, rows, columns)
        groups = scale.shape[1]
        zeros = _words(tensors, name, ZEROS, [groups, word_count(rows, bits)])
        # a code of zero is 2^(bits-1), or one less in format 1; GPTQModel has its own way of 3 bits
        if entries.sym and bits != 3:
            if unpack_words(zeros, bits, rows).unique().tolist() not in ([0], [-1]):
                fault = f"not {1 << (bits - 1)} everywhere, but config.json says symmetric"
                raise contradicts(f"{name}.{ZEROS}", fault)
        elif not entries.sym and bits == 8:
            raise RacError(
                f"{name}.{ZEROS}: asymmetric weights of 8 bits have no kernel; leave out "
                "--quantization rac, or quantize them symmetrically"
            )
        if not entries.sym and entries.checkpoint_format == "gptq":
            if bits == 3:
                raise RacError(
                    f"{name}.{ZEROS}: zero points of 3 bits in format gptq have two meanings, "
                    "since AutoGPTQ and GPTQModel subtract different numbers from them; save the "
                    "model in format gptq_v2 (checkpoint_format), or symmetric"
                )
            zeros = zeros + _SUBTRACTED[bits]
        if entries.desc_act and groups > 1:
            part_of(tensors, name, ORDER)
        codes = unpack_words(words.t(), bits, columns)
        order = _order(tensors, name, columns, groups)
        codes = (codes if order is None else codes[:, order]).contiguous()
        code_of_zero = None if entries.sym else unpack_words(zeros, bits, rows)
        weight = with_zeros(codes, scale, code_of_zero, bits, name)
        return replace(weight, order=order)


class Awq(_Entries):
    """The format AWQ: the entries of config.json that weights are read by, and their check."""

    method: ClassVar[str] = "awq"
    lm_head: ClassVar[bool] = False  # never quantized
    bits: Literal[4] = Field(validation_alias=AliasChoices("w_bit", "bits"))
    group_size: int = Field(validation_alias=AliasChoices("q_group_size", "group_size"))
    zero_point: bool
    backend: str | None = None
    version: str = Field(
        "gemm", validation_alias=AliasChoices("version", "checkpoint_format", "format")
    )

    @field_validator("version", "backend")
    @classmethod
    def _gemm(cls, value: str | None, info: Any) -> str | None:
        version = str(value).lower()
        if version == "llm-awq" or (info.field_name == "version" and version != "gemm"):
            raise ValueError("only words of version gemm are read")
        return value

    def check(self, tensors: Mapping[str, Tensor], name: str) -> StoredWeight:
        """Check the tensors of a module as untrusted input; return its weight, all stored.

        `tensors`: `qweight` int32 [K, N / 8], `qzeros` int32 [K / group, N / 8], `scales`
        [K / group, N]. RacError as of GPTQ.
        """
        if ORDER in tensors:
            fault = "AWQ does not reorder columns, so this is another format"
            raise contradicts(f"{name}.{ORDER}", fault)
        words = _words(tensors, name, WORDS)
        columns, rows = len(words), words.shape[1] * 8
        scale = _scales(tensors, name, self.group_size, rows, columns)
        zeros = _in_order(_words(tensors, name, ZEROS, [scale.shape[1], rows // 8]))
        if not self.zero_point and bool((zeros != 0).any()):
            fault = "not all 8, but config.json says zero_point: false"
            raise contradicts(f"{name}.{ZEROS}", fault)
        codes = _in_order(words).t().contiguous()
        return with_zeros(codes, scale, zeros if self.zero_point else None, 4, name)


def format_of(quantization: object) -> Gptq | Awq | None:
    """Return the entries of a `quantization_config` of GPTQ or AWQ, None for any other value.

    RacError: an entry is missing or malformed.
    """
    if not isinstance(quantization, Mapping):
        return None
    method = quantization.get("quant_method")
    known = (format for format in (Gptq, Awq) if format.method == method)
    format = next(known, None)
    return None if format is None else format.of(quantization)


def _words(
    tensors: Mapping[str, Tensor], name: str, part: str, shape: list[int] | None = None
) -> Tensor:
    words = part_of(tensors, name, part)
    size = list(words.shape)
    if words.dtype != torch.int32 or words.dim() != 2 or not words.numel():
        raise damaged(f"{name}.{part}", f"{words.dtype} {size} is no matrix of int32 words")
    _check_shape(words, shape or size, f"{name}.{part}")
    return words


def _scales(
    tensors: Mapping[str, Tensor], name: str, group: int, rows: int, columns: int
) -> Tensor:
    """Return the scales, float32 [N, K / group]; `group` -1: one per row."""
    group = columns if group == -1 else group
    if columns % group:
        fault = f"{columns} columns are no multiple of config.json's groups of {group}"
        raise contradicts(f"{name}.{WORDS}", fault)
    scales = part_of(tensors, name, SCALES)
    if scales.dtype not in FLOATS or not bool(scales.isfinite().all()):
        raise damaged(f"{name}.{SCALES}", f"{scales.dtype}, or not finite")
    _check_shape(scales, [columns // group, rows], f"{name}.{SCALES}")
    return scales.t().float().contiguous()


def _check_shape(tensor: Tensor, expected: list[int], name: str) -> None:
    if list(tensor.shape) != expected:
        fault = f"shape {list(tensor.shape)}, but a weight of this size and config.json's groups"
        raise contradicts(name, f"{fault} have {expected}")


def _order(tensors: Mapping[str, Tensor], name: str, columns: int, groups: int) -> Tensor | None:
    """Return the columns sorted by group, int64 [K]; None if groups are contiguous."""
    if ORDER not in tensors:
        return None
    index = tensors[ORDER]
    if index.dtype not in (torch.int32, torch.int64) or list(index.shape) != [columns]:
        fault = f"{index.dtype} {list(index.shape)} is not the group of each of {columns} columns"
        raise damaged(f"{name}.{ORDER}", fault)
    index, in_order = index.long(), torch.arange(groups).repeat_interleave(columns // groups)
    if torch.equal(index, in_order):
        return None
    order = index.argsort(stable=True)
    if not torch.equal(index[order], in_order):
        fault = f"does not give {columns // groups} columns to each of {groups} groups"
        raise contradicts(f"{name}.{ORDER}", fault)
    return order


def _in_order(words: Tensor) -> Tensor:
    """Return the 4-bit codes minus 8 of AWQ's words [lines, N / 8], int8 [lines, N]."""
    lines, count = words.shape
    return unpack_words(words, 4, count * 8).view(lines, count, 8)[..., _AWQ_PLACES].flatten(1)
