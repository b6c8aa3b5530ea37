"""Calibration batches with a weight per token; padding weighs 0, so that it never reaches a Hessian."""

from __future__ import annotations

import hashlib
import random
from typing import Any

import torch
from torch.utils.data import DataLoader

from rac_modifier.calibration.mixture import CalibrationSequence, Composition
from rac_modifier.errors import RacError
from rac_modifier.settings.calibration import CalibrationSettings

# Shards that the batches are divided into, which processes share. 24 can be shared evenly by 2, 3, 4, 6, 8 and 12.
SHARDS = 24
# Tokens of a row of `joined()`: the length of a sequence that AutoRound takes by default.
ROW_TOKENS = 2048


class CalibrationLoader(DataLoader):
    """The dataloader that RAC uses instead of upstream's.

    Yields `{"input_ids": int64 [rows, length]}`, padded on the right: with causal attention no real token reads what comes
    after it, so no attention mask is needed and the activations of real tokens are exact. `token_weights[i]` belongs to
    batch i, float32 [rows, length]: 0 for padding, the token's weight elsewhere.

    A `share` has its batches shard by shard (pruning/shard_sum.py): with batch i, `shards_ended[i]`
    of them end, and `numbers[i]` is the place of batch i in the share of one process alone.

    Modifiers that do not read token weights get `unpadded()`: the same sequences, one per batch, without any padding. AutoRound
    gets `joined()`.
    """

    def __init__(
        self,
        sequences: list[CalibrationSequence],
        composition: Composition,
        settings: CalibrationSettings,
        pad_token_id: int,
        batch_tokens: int | None = None,
        groups: list[list[CalibrationSequence]] | None = None,
    ):
        """Of `groups`, the sequences of each batch; without them, of batches of at most `batch_tokens` (0: one sequence)."""
        self.sequences, self.composition, self.settings = sequences, composition, settings
        self.pad_token_id = pad_token_id
        if groups is None:
            groups = self._grouped(settings.batch_tokens if batch_tokens is None else batch_tokens)
        self._groups = groups
        self.token_weights: list[torch.Tensor] = []
        batches = []
        for group in self._groups:
            length = max(len(s.ids) for s in group)
            ids = torch.full((len(group), length), pad_token_id)
            weights = torch.zeros(len(group), length)
            for row, sequence in enumerate(group):
                ids[row, : len(sequence.ids)] = torch.tensor(sequence.ids)
                weights[row, : len(sequence.ids)] = torch.tensor(sequence.weights(settings))
            batches.append({"input_ids": ids})
            self.token_weights.append(weights)
        self.shards_ended, self.numbers = [0] * len(batches), list(range(len(batches)))
        super().__init__(_Batches(batches), batch_size=None, shuffle=False)

    def unpadded(self) -> CalibrationLoader:
        """The same sequences, one per batch, in the same order."""
        return CalibrationLoader(
            self.sequences, self.composition, self.settings, self.pad_token_id, batch_tokens=0
        )

    def joined(self) -> CalibrationLoader:
        """The same tokens, one sequence after the other, in rows of equal length, one per batch; what fills no row is left out.

        A row has as many tokens as the longest sequence, at most 2,048. For AutoRound, which counts padding in its loss and takes
        the rotary positions of the first row for all (llm-compressor 0.14, auto-round 0.15).
        """
        length = min(ROW_TOKENS, max(len(sequence.ids) for sequence in self.sequences))
        ids = [token for sequence in self.sequences for token in sequence.ids]
        rows = [
            CalibrationSequence(ids=tuple(ids[i : i + length]), prompt_tokens=0, kind="joined")
            for i in range(0, len(ids) - length + 1, length)
        ]
        return CalibrationLoader(
            rows, self.composition, self.settings, self.pad_token_id, batch_tokens=0
        )

    def share(self, rank: int, count: int) -> CalibrationLoader:
        """Of `count` loaders that have about as many padded tokens and together all batches, number `rank`; batches are not cut.

        Batches are divided into shards, as many with any `count`, and number `rank` has each `count`-th of these. It ends as many
        as the others, the last ones perhaps without a batch.

        Raises:
            RacError: there are fewer batches, or fewer shards.
        """
        if len(self._groups) < count:
            raise RacError(
                f"{count} processes share {len(self._groups)} batches of the calibration set, and each needs one: start at most "
                f"{len(self._groups)}, or set a lower calibration.batch_tokens (now {self.settings.batch_tokens:,})"
            )
        if count > SHARDS:
            raise RacError(
                f"{count} processes: at most {SHARDS} share a calibration set; start {SHARDS} or fewer"
            )
        shards = self._shards()
        places = iter(range(len(self._groups)))
        numbers = [[next(places) for _ in shard] for shard in shards]
        groups = [self._groups[index] for shard in shards[rank::count] for index in shard]
        sequences = [sequence for group in groups for sequence in group]
        share = CalibrationLoader(
            sequences, self.composition, self.settings, self.pad_token_id, groups=groups
        )
        share.numbers = [number for shard in numbers[rank::count] for number in shard]
        share.shards_ended = [
            int(i + 1 == len(shard)) for shard in shards[rank::count] for i in range(len(shard))
        ]
        share.shards_ended[-1] += -(-len(shards) // count) - len(shards[rank::count])
        return share

    def _shards(self) -> list[list[int]]:
        """The numbers of the batches, divided into shards of about as many padded tokens; the largest shards first."""
        sizes = [weights.numel() for weights in self.token_weights]
        count = min(SHARDS, len(sizes))
        loads, shards = [0] * count, [[] for _ in range(count)]  # type: tuple[list[int], list[list[int]]]
        for index in sorted(
            range(len(sizes)), key=lambda i: -sizes[i]
        ):  # the largest first, to where there is least
            least = loads.index(min(loads))
            shards[least].append(index)
            loads[least] += sizes[index]
        return [sorted(shards[i]) for i in sorted(range(count), key=lambda i: -loads[i])]

    def sha256(self) -> str:
        """A hash (64 hex digits) of the batches and of their token weights."""
        digest = hashlib.sha256()
        for batch, weights in zip(self, self.token_weights, strict=True):
            digest.update(f"{tuple(weights.shape)}".encode())
            digest.update(batch["input_ids"].numpy().astype("<i8").tobytes())
            digest.update(weights.numpy().astype("<f4").tobytes())
        return digest.hexdigest()

    def _grouped(self, batch_tokens: int) -> list[list[CalibrationSequence]]:
        """Sequences of similar length share a batch of at most `batch_tokens` padded tokens; 0: one sequence per batch."""
        if batch_tokens == 0:
            return [[sequence] for sequence in self.sequences]
        groups: list[list[CalibrationSequence]] = []
        for sequence in sorted(self.sequences, key=lambda s: len(s.ids)):
            if not groups or (len(groups[-1]) + 1) * len(sequence.ids) > batch_tokens:
                groups.append([])
            groups[-1].append(sequence)
        random.Random(self.settings.seed).shuffle(groups)
        return groups


class _Batches(torch.utils.data.Dataset):
    def __init__(self, batches: list[dict[str, Any]]):
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.batches[index]
