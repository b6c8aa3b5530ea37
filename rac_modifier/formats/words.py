"""Values of few bits in int32 words, as compressed-tensors' format pack-quantized holds them.

A value v is stored as the code v + 2^(bits-1), lowest bits first, one code after the other; of
3 bits some are in two words, as of compressed-tensors 0.19. compressed-tensors' own functions fill
up the last word with other bits, which nobody reads. Importing them would import transformers,
which serving and `rac inspect` do not.

A dense weight is (code - code of zero) * scale. Its codes are in words along the columns; the
codes of zero, one per row and group of columns, are in words along the rows.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from rac_modifier.errors import RacError
from rac_modifier.formats.bitmask import MOST_COLUMNS, contradicts, damaged, part_of
from rac_modifier.formats.encoding import Encoding
from rac_modifier.formats.quantization_config import BITS, PACK_QUANTIZED, WeightScheme
from rac_modifier.formats.stored_weight import SCALE, StoredWeight, all_stored, check_scale

# What a module stores instead of `weight` where its format is pack-quantized.
WORDS, WORDS_SHAPE = "weight_packed", "weight_shape"
ZEROS, ORDER = "weight_zero_point", "weight_g_idx"
_BLOCK = 1 << 16  # multiples of `bits` words that are unpacked together
PACKED_BITS = (4, 8)  # of values that are packed here, as sparse weights


def pack_words(values: Tensor, bits: int) -> Tensor:
    """Pack int8 [..., n] of 4 or 8 bits into int32 [..., ceil(n * bits / 32)], filled up with 0."""
    if values.dtype != torch.int8:
        raise RacError(f"values of {values.dtype} cannot be packed into int32 words; use int8")
    limit = 1 << (bits - 1)
    if bits < 8 and values.numel() and (int(values.min()) < -limit or int(values.max()) >= limit):
        raise RacError(
            f"a value outside [{-limit}, {limit - 1}] exceeds {bits} bits; save the model again"
        )
    count = values.shape[-1]
    padded = torch.nn.functional.pad(values, (0, word_count(count, bits) * 32 // bits - count))
    codes = (padded.to(torch.int16) + limit).to(torch.uint8)
    if bits == 4:
        codes = codes[..., ::2] | (codes[..., 1::2] << 4)
    return codes.contiguous().view(torch.int32)


def unpack_words(words: Tensor, bits: int, count: int) -> Tensor:
    """Return `count` int8 of 2 to 8 bits from int32 [..., ceil(count * bits / 32)]."""
    if words.dtype != torch.int32 or not words.dim() or words.shape[-1] != word_count(count, bits):
        raise RacError(
            f"{words.dtype} {list(words.shape)} does not hold {count} values of {bits} bits "
            f"({word_count(count, bits)} int32); damaged, or of compressed-tensors before 0.19"
        )
    values = torch.empty(*words.shape[:-1], count, dtype=torch.int8, device=words.device)
    step = bits * max(1, _BLOCK // max(1, values.numel() // max(1, count)))  # 32 values per `bits`
    parts = values.split(step * 32 // bits, dim=-1)
    for part, block in zip(parts, words.split(step, dim=-1), strict=True):
        part.copy_(_values(block, bits)[..., : part.shape[-1]])
    return values


def _values(words: Tensor, bits: int) -> Tensor:
    """Return all values of these words, int16."""
    # a copy: a row of a transposed matrix may count as contiguous, and cannot be viewed as bytes
    codes = words.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    if 8 % bits:  # eight codes in `bits` bytes; some are in two of these
        codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % bits))
        byte, eight = codes.unflatten(-1, (-1, bits)).unbind(-1), []
        for start in range(0, 8 * bits, bits):
            at, low = divmod(start, 8)
            ends = low + bits <= 8  # in this byte
            eight.append(byte[at] >> low if ends else byte[at] >> low | byte[at + 1] << 8 - low)
        codes = torch.stack(eight, dim=-1).flatten(-2) & ((1 << bits) - 1)
    elif bits < 8:
        shifted = [codes >> at for at in range(0, 8, bits)]
        codes = torch.stack(shifted, dim=-1).flatten(-2) & ((1 << bits) - 1)
    return codes.to(torch.int16) - (1 << (bits - 1))


def word_count(count: int, bits: int) -> int:
    """Return the int32 words that `count` values of `bits` bits take."""
    return -(-count * bits // 32)


class PackQuantized:
    """Dense codes of 2, 3, 4 or 8 bits [N, K]. `dtypes` names the tensors (None: floats):

    `weight_packed` [N, ceil(K bits / 32)], `weight_scale` [N, K / group], `weight_shape` [2], and
    without symmetry `weight_zero_point` [ceil(N bits / 32), K / group]. 8 bits are symmetric, and
    may be `weight` int8 [N, K] instead of words.
    """

    name = PACK_QUANTIZED
    dtypes: Mapping[str, torch.dtype | None] = {
        WORDS: torch.int32,
        SCALE: None,
        WORDS_SHAPE: torch.int64,
        ZEROS: torch.int32,
        ORDER: torch.int32,
        "weight": None,
    }

    @staticmethod
    def compress(weight: Tensor, bits: int) -> dict[str, Tensor]:
        """Return the words of an int8 weight [N, K], and its shape, by part."""
        shape = weight.new_tensor(weight.shape, dtype=torch.int64)
        return {WORDS: pack_words(weight, bits), WORDS_SHAPE: shape}

    @staticmethod
    def check(tensors: Mapping[str, Tensor], module: str, scheme: WeightScheme) -> StoredWeight:
        """Check untrusted tensors; return the weight, all stored (RacError names a wrong part)."""
        if ORDER in tensors:
            raise RacError(
                f"{module}.{ORDER}: its columns are reordered (actorder: group), which no kernel "
                "reads; leave out --quantization rac, or quantize with actorder: static"
            )
        bits, symmetric = scheme.encoding.bits, scheme.encoding.symmetric
        if bits == 8 and not symmetric:  # a code less its code of zero may not fit int8
            raise RacError(
                f"{module}.{ZEROS}: asymmetric weights of 8 bits have no kernel; quantize them "
                "symmetrically"
            )
        if bits == 8 and WORDS not in tensors:
            codes = part_of(tensors, module, "weight")
            if codes.dtype != torch.int8 or codes.dim() != 2 or not codes.numel():
                fault = f"{codes.dtype} {list(codes.shape)}, but config.json says that it is int8"
                raise contradicts(f"{module}.weight", fault)
        else:
            rows, columns = _shape(tensors, module)
            words = part_of(tensors, module, WORDS)
            codes = _unpacked(words, rows, columns, f"{module}.{WORDS}", bits)
        scale = _check_groups(tensors, codes, module, scheme)
        if symmetric and ZEROS in tensors:
            fault = "must not be there, since config.json quantizes it symmetrically"
            raise contradicts(f"{module}.{ZEROS}", fault)
        if symmetric:
            return with_zeros(codes, scale, None, bits, module)
        words, (rows, groups) = part_of(tensors, module, ZEROS), scale.shape
        words = words.t() if words.dim() == 2 else words
        zeros = _unpacked(words, groups, rows, f"{module}.{ZEROS}", bits)
        return with_zeros(codes, scale, zeros, bits, module)

    @classmethod
    def read(
        cls, tensors: Mapping[str, Tensor], module: str, schemes: Iterable[WeightScheme] = ()
    ) -> StoredWeight | None:
        """Return the weight of a module by any of `schemes` (RacError), or None: not read here."""
        words, scale = tensors.get(WORDS), tensors.get(SCALE)
        if words is None or words.dtype != torch.int32:
            return None
        if WORDS_SHAPE not in tensors or ORDER in tensors:
            return None
        _, columns = _shape(tensors, module)
        stated = {scheme.encoding.bits for scheme in schemes if scheme.format == PACK_QUANTIZED}
        widths = stated & {*BITS, *PACKED_BITS} if stated else set(PACKED_BITS)
        count = words.shape[-1] if words.dim() else 0
        fitting = [bits for bits in widths if count == word_count(columns, bits)]
        if len(fitting) != 1:
            if stated != widths:
                return None
            fault = f"{count} int32 words per row do not hold {columns} values of"
            allowed = " or ".join(map(str, sorted(widths)))
            raise contradicts(f"{module}.{WORDS}", f"{fault} {allowed} bits")
        per_row = scale.shape[1] if scale is not None and scale.dim() == 2 else 1
        group = columns // max(per_row, 1)
        bits, symmetric = fitting[0], ZEROS not in tensors
        if bits == 8 and not symmetric:
            return None
        encoding = Encoding("int", bits, group, symmetric)
        return cls.check(tensors, module, WeightScheme(encoding, "group", PACK_QUANTIZED))


def with_zeros(
    codes: Tensor, scale: Tensor, zeros: Tensor | None, bits: int, name: str
) -> StoredWeight:
    """Return the weight of codes int8 [N, K], overwritten, and codes of zero int8 [groups, N]."""
    if zeros is not None:
        zeros = zeros.t().contiguous()
        codes.view(*zeros.shape, -1).sub_(zeros[:, :, None])
        zeros = (zeros + (1 << (bits - 1))).to(torch.uint8)
    return replace(all_stored(codes, name), scale=scale, bits=bits, zeros=zeros)


def _check_groups(
    tensors: Mapping[str, Tensor], codes: Tensor, name: str, scheme: WeightScheme
) -> Tensor:
    """Return the scales of codes [N, K], float32 [N, K / group] or [N, 1]."""
    rows, columns = codes.shape
    scale = check_scale(tensors, codes.dtype, rows, columns, name)
    assert scale is not None  # since the values are integers
    group = scheme.encoding.group_size or columns
    if scale.shape[1] * group != columns:
        stated = "one per row" if group == columns else f"groups of {group} columns"
        fault = f"{scale.shape[1]} per row of {columns} columns, but config.json has {stated}"
        raise contradicts(f"{name}.{SCALE}", fault)
    return scale


def _shape(tensors: Mapping[str, Tensor], name: str) -> tuple[int, int]:
    """Return N and K; both are compared with other parts before anything is sized by them."""
    shape = part_of(tensors, name, WORDS_SHAPE)
    is_shape = shape.dtype in (torch.int64, torch.int32) and shape.shape == (2,)
    if not is_shape or bool((shape < 1).any()) or int(shape[1]) > MOST_COLUMNS:
        fault = f"{shape.dtype} {shape.flatten()[:4].tolist()} is not the shape of a matrix"
        raise damaged(f"{name}.{WORDS_SHAPE}", fault)
    return int(shape[0]), int(shape[1])


def _unpacked(words: Tensor, rows: int, columns: int, name: str, bits: int) -> Tensor:
    """Return the codes less 2^(bits-1), int8 [rows, columns], of a matrix of words."""
    if words.dim() != 2 or words.shape[0] != rows:
        raise damaged(name, f"shape {list(words.shape)} does not have {rows} rows")
    try:
        return unpack_words(words, bits, columns)
    except RacError as error:
        raise RacError(f"{name}: {error}") from error
