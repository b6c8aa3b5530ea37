"""Random numbers per row of a batch: Gumbel noise from a counter-based hash."""

from __future__ import annotations

import hashlib

import torch

# The constants of splitmix64 (Steele, Lea, Flood 2014) as signed 64-bit numbers, which is what torch multiplies.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MUL_1 = 0xBF58476D1CE4E5B9 - 2**64
_MUL_2 = 0x94D049BB133111EB - 2**64
_POSITION_STEP = 0x9E3779B1  # small: position * step is a Python number that must stay within int64
_LARGEST_BELOW_ONE = 1 - 2**-24


def row_keys(seed: int, keys: list[str], device: torch.device | str = "cpu") -> torch.Tensor:
    """One int64 per row, a hash of (seed, key)."""
    digests = [hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=8).digest() for key in keys]
    return torch.tensor(
        [int.from_bytes(d, "little", signed=True) for d in digests],
        dtype=torch.int64,
        device=device,
    )


def gumbel_noise(rows: torch.Tensor, position: int, tokens: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise [rows, tokens] in float32, a pure function of (row key, position, token).

    `rows` are int64 keys [rows], `tokens` ids [tokens], or [rows, tokens] where each row has its own.

    Added to scores, it makes their arg max a draw from their softmax (Gumbel-max). With one stream of random numbers for all
    rows, as in `do_sample=True`, a resumed batch would draw other tokens.

    A uniform v = (63 hashed bits) / 2^63 becomes -log(-log1p(-v)). The large values of the noise, which decide the arg max,
    then come from small v, where float32 is fine-grained; -log(-log(v)) would cap them at 17.
    """
    row = _mix(rows + (position + 1) * _POSITION_STEP)
    token = _mix((tokens.to(torch.int64) + 1) * _GOLDEN)
    bits = _mix(row[:, None] ^ token).bitwise_and_(2**63 - 1)
    v = bits.to(torch.float32).add_(0.5).mul_(2.0**-63).clamp_(max=_LARGEST_BELOW_ONE)
    return v.neg_().log1p_().neg_().log_().neg_()


def _mix(x: torch.Tensor) -> torch.Tensor:
    """The finalizer of splitmix64, a bijection on int64 in which each input bit flips each output bit half the time."""
    x = (x ^ _shift_right(x, 30)).mul_(_MUL_1)
    x.bitwise_xor_(_shift_right(x, 27)).mul_(_MUL_2)
    return x.bitwise_xor_(_shift_right(x, 31))


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift: torch's own keeps the sign."""
    return (x >> bits).bitwise_and_(2 ** (64 - bits) - 1)
