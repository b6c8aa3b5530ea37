"""Draw the next token of each row: temperature, top-k, top-p, then Gumbel noise from a hash.

The noise of a token is a function of (seed, key of the row, position, token) alone, so a
draw depends neither on the batch nor on a resume. A whole vocabulary is never sorted.
"""

import hashlib
from dataclasses import dataclass

import torch

# Candidates of top-p at first; eight times as many if they hold too little probability.
_CANDIDATES = 256
# The constants of splitmix64 (Steele, Lea, Flood 2014) as signed 64-bit numbers for torch.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MUL_1 = 0xBF58476D1CE4E5B9 - 2**64
_MUL_2 = 0x94D049BB133111EB - 2**64
_POSITION_STEP = 0x9E3779B1  # small: position * step is a Python number that must stay within int64
_LARGEST_BELOW_ONE = 1 - 2**-24


@dataclass(frozen=True)
class Draw:
    """Temperature (0: arg max), top-k (0: all), then top-p, as transformers does."""

    temperature: float
    top_k: int = 0
    top_p: float = 1.0

    def tokens(self, logits: torch.Tensor, rows: torch.Tensor, position: int) -> torch.Tensor:
        """Draw token ids [rows] from logits [rows, vocabulary]; `rows` are keys of `row_keys`."""
        if not self.temperature:
            return logits.argmax(-1)
        scores = logits.float() / self.temperature
        vocabulary = scores.shape[-1]
        if not self.top_k and self.top_p >= 1.0:
            everything = torch.arange(vocabulary, device=scores.device)
            return (scores + _gumbel_noise(rows, position, everything)).argmax(-1)
        values, ids = self._candidates(scores)
        chosen = (values + _gumbel_noise(rows, position, ids)).argmax(-1, keepdim=True)
        return ids.gather(1, chosen).squeeze(1)

    def _candidates(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scores and ids [rows, candidates], likeliest first; -inf: never drawn."""
        vocabulary = scores.shape[-1]
        if self.top_k:
            values, ids = scores.topk(min(self.top_k, vocabulary))
            probabilities = values.softmax(-1)
        else:
            total = scores.logsumexp(-1, keepdim=True)
            count = min(_CANDIDATES, vocabulary)
            while True:
                values, ids = scores.topk(count)
                probabilities = (values - total).exp()
                if count == vocabulary or bool((probabilities.sum(-1) >= self.top_p).all()):
                    break
                count = min(8 * count, vocabulary)
        likelier = probabilities.cumsum(-1) - probabilities  # probability of the likelier tokens
        likelier[:, 0] = 0.0
        return values.masked_fill(likelier >= self.top_p, -torch.inf), ids


def row_keys(seed: int, keys: list[str], device: torch.device | str = "cpu") -> torch.Tensor:
    """Return an int64 per row, a hash of (seed, key)."""
    digests = [hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=8).digest() for key in keys]
    return torch.tensor(
        [int.from_bytes(d, "little", signed=True) for d in digests],
        dtype=torch.int64,
        device=device,
    )


def _gumbel_noise(rows: torch.Tensor, position: int, tokens: torch.Tensor) -> torch.Tensor:
    """Compute standard Gumbel noise [rows, tokens], float32, of (row key, position, token).

    `rows` are int64 keys [rows], `tokens` ids [tokens], or [rows, tokens] if each row has its own.
    A uniform v = (63 hashed bits) / 2^63 becomes -log(-log1p(-v)): the large values come from small
    v, where float32 is fine-grained.
    """
    row = _mix(rows + (position + 1) * _POSITION_STEP)
    token = _mix((tokens.to(torch.int64) + 1) * _GOLDEN)
    bits = _mix(row[:, None] ^ token).bitwise_and_(2**63 - 1)
    v = bits.to(torch.float32).add_(0.5).mul_(2.0**-63).clamp_(max=_LARGEST_BELOW_ONE)
    return v.neg_().log1p_().neg_().log_().neg_()


def _mix(x: torch.Tensor) -> torch.Tensor:
    """Apply the finalizer of splitmix64, a bijection on int64 that mixes all bits."""
    x = (x ^ _shift_right(x, 30)).mul_(_MUL_1)
    x.bitwise_xor_(_shift_right(x, 27)).mul_(_MUL_2)
    return x.bitwise_xor_(_shift_right(x, 31))


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Shift logically; torch's own shift keeps the sign."""
    return (x >> bits).bitwise_and_(2 ** (64 - bits) - 1)
