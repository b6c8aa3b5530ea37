"""Calibration batches with a weight per token; padding weighs 0 and reaches no Hessian."""

import hashlib
import random
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from rac_modifier.calibration.mixture import CalibrationSequence
from rac_modifier.errors import RacError
from rac_modifier.measure.teacher_forcing import batches_of_like_length
from rac_modifier.settings.calibration import CalibrationSettings

# Shards of the batches, which processes share evenly if they are 2, 3, 4, 6, 8 or 12.
SHARDS = 24
# Tokens of a row of `joined()`: the length of a sequence that AutoRound takes by default.
ROW_TOKENS = 2048


@dataclass(frozen=True)
class _Share:
    """The batches of a process, and how they make up shards."""

    batches: list[list[CalibrationSequence]]
    shards_ended: list[int]  # by batch: how many shards end with it (pruning/shard_sum.py)
    numbers: list[int]  # by batch: its place in the share of one process alone

    @classmethod
    def whole(cls, batches: list[list[CalibrationSequence]]) -> Self:
        """Return all batches, not divided into shards."""
        return cls(batches, [0] * len(batches), list(range(len(batches))))


class CalibrationLoader(DataLoader):
    """Yields `{"input_ids": int64 [rows, length]}`, padded on the right with 0, without mask."""

    def __init__(self, sequences: list[CalibrationSequence], share: _Share):
        self.sequences, self._batches = sequences, share.batches
        self.shards_ended, self.numbers = share.shards_ended, share.numbers
        self.token_weights: list[torch.Tensor] = []  # float32 [rows, length]: 0 for padding
        inputs: list[dict[str, torch.Tensor]] = []
        for batch in share.batches:
            rows = [torch.tensor(sequence.ids) for sequence in batch]
            weights = [torch.ones(len(sequence.ids)) for sequence in batch]
            inputs.append({"input_ids": pad_sequence(rows, batch_first=True)})  # any token pads
            self.token_weights.append(pad_sequence(weights, batch_first=True))
        dataset: Any = inputs  # a list has what torch needs of a Dataset
        super().__init__(dataset, batch_size=None, shuffle=False)

    @classmethod
    def of(cls, sequences: list[CalibrationSequence], settings: CalibrationSettings) -> Self:
        """Make batches of at most `settings.batch_tokens`, in an order of the seed's."""
        limit = settings.batch_tokens
        batches = list(batches_of_like_length(sequences, limit, lambda s: len(s.ids)))
        random.Random(settings.seed).shuffle(batches)
        return cls(sequences, _Share.whole(batches))

    def unpadded(self) -> Self:
        """Return the same sequences, one per batch, for modifiers that read no token weights."""
        return type(self)(self.sequences, _Share.whole([[s] for s in self.sequences]))

    def joined(self) -> Self:
        """Return the same tokens in rows of equal length, one per batch; the remainder is left out.

        AutoRound counts padding in its loss, and takes the first row's rotary positions for all.
        """
        length = min(ROW_TOKENS, max(len(sequence.ids) for sequence in self.sequences))
        ids = [token for sequence in self.sequences for token in sequence.ids]
        starts = range(0, len(ids) - length + 1, length)
        rows = [CalibrationSequence(tuple(ids[i : i + length]), 0, "joined") for i in starts]
        return type(self)(rows, _Share.whole([[row] for row in rows]))

    def share(self, rank: int, count: int) -> Self:
        """Return the batches of process `rank` of `count`: every `count`-th of the shards.

        Each process ends as many shards as the others, the last ones perhaps without a batch.
        """
        most = min(len(self._batches), SHARDS)
        if count > most:
            raise RacError(
                f"{count} processes share {len(self._batches)} batches of the calibration set: "
                f"start at most {most}, or set a lower calibration.batch_tokens"
            )
        shards = self._shards()
        places = iter(range(len(self._batches)))
        numbers = [[next(places) for _ in shard] for shard in shards]
        mine = shards[rank::count]
        batches = [self._batches[index] for shard in mine for index in shard]
        ended = [int(i + 1 == len(shard)) for shard in mine for i in range(len(shard))]
        ended[-1] += -(-len(shards) // count) - len(mine)
        mine_numbers = [number for shard in numbers[rank::count] for number in shard]
        sequences = [sequence for batch in batches for sequence in batch]
        return type(self)(sequences, _Share(batches, ended, mine_numbers))

    def _shards(self) -> list[list[int]]:
        """Divide the numbers of the batches into shards of similar size, the largest first."""
        sizes = [weights.numel() for weights in self.token_weights]
        shards: list[list[int]] = [[] for _ in range(min(SHARDS, len(sizes)))]

        def load(shard: list[int]) -> int:
            return sum(sizes[index] for index in shard)

        for index in sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True):
            min(shards, key=load).append(index)
        return [sorted(shard) for shard in sorted(shards, key=load, reverse=True)]

    def sha256(self) -> str:
        """Hash (64 hex digits) the batches and their token weights."""
        digest = hashlib.sha256()
        for batch, weights in zip(self, self.token_weights, strict=True):
            digest.update(f"{tuple(weights.shape)}".encode())
            digest.update(batch["input_ids"].numpy().astype("<i8").tobytes())
            digest.update(weights.numpy().astype("<f4").tobytes())
        return digest.hexdigest()
