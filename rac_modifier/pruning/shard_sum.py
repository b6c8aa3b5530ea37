"""Sums over a calibration set whose bits do not depend on how many processes share it.

Float32 addition is not associative, so a sum depends on the order of its terms. Here the order is fixed by the data: the
calibration set is cut into shards (`CalibrationLoader.share`), a process adds up whole shards batch by batch, and the sums of the
shards are added in the order of their numbers,

    S = ((shard 0 + shard 1) + shard 2) + ...

whichever process has which. Of N processes, number r has the shards r, r + N, r + 2 N, ... So the first N shards end in all of
them, are exchanged and added, then the next N. Each adds a part of the elements, and so keeps one shard and its part of S.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from rac_modifier.processes import ALONE, Processes

Block = tuple[int, int, int]
_PIECE = 1 << 22  # elements that are exchanged at once


class ShardSum:
    """A sum of matrices [rows, columns]: batches are added to `shard`, and `end_shard` adds that to the sum of the shards before.

    `blocks` are the parts of the matrices that are used, as (first row, last row + 1, number of columns). A shard has no memory
    for the rest.
    """

    def __init__(
        self,
        rows: int,
        columns: int,
        device: torch.device | str,
        dtype: torch.dtype = torch.float32,
        blocks: Sequence[Block] | None = None,
        processes: Processes = ALONE,
    ):
        self.rows, self.columns, self.dtype, self.device = (
            rows,
            columns,
            dtype,
            torch.device(device),
        )
        self._processes = processes
        self._blocks = list(blocks or [(0, rows, columns)])
        self._shard: list[torch.Tensor] | None = None
        self._open = False  # whether something was added since the last shard ended
        self._total: torch.Tensor | None = None
        self._parts: list[
            torch.Tensor
        ] = []  # with several processes, of each piece what this one adds up

    @property
    def shard(self) -> list[torch.Tensor]:
        """The sum of the present shard, block by block, to be added to in place."""
        self._open = True
        return self._zeroed_shard()

    @property
    def total(self) -> torch.Tensor:
        """The sum of all shards; with several processes, after `finish`. What is in no block is zero."""
        if self._total is None:
            assert not self._parts, "the parts of several processes are put together by finish"
            return self._whole(self._zeroed_shard())
        assert not self._open, "the last shard was not ended"
        return self._total

    def take(self) -> torch.Tensor:
        """The sum of all shards, to be changed in place: it is gone from here."""
        total = self.total
        self._total = self._shard = None
        return total

    def end_shard(self) -> None:
        """Add the shard to the sum, in all processes, each with a shard of its own (without a batch, where there are no more)."""
        if self._processes.count > 1:
            self._exchange()
        elif self._total is None:
            self._total, self._shard = self._whole(self._zeroed_shard()), None
        else:
            for (first, last, columns), part in zip(
                self._blocks, self._zeroed_shard(), strict=True
            ):
                self._total[first:last, :columns].add_(part)
                part.zero_()
        self._open = False

    def finish(self) -> None:
        """After the last shard: the whole sum in all processes, with the same bits. If none has ended, this ends one."""
        if self._total is None and not self._parts:
            self.end_shard()
        assert not self._open, "the last shard was not ended"
        self._shard = None
        if self._parts:
            self._total = torch.zeros(self.rows, self.columns, device=self.device, dtype=self.dtype)
            for (block, start, stop), part in zip(self._pieces(), self._parts, strict=True):
                first, _, columns = self._blocks[block]
                piece = self._total[first + start : first + stop, :columns]
                piece.copy_(self._processes.joined(part)[: piece.numel()].view_as(piece))
            self._parts = []

    def _zeroed_shard(self) -> list[torch.Tensor]:
        """That of the present shard; zeros where it has none yet."""
        if self._shard is None:
            self._shard = [
                torch.zeros(last - first, columns, device=self.device, dtype=self.dtype)
                for first, last, columns in self._blocks
            ]
        return self._shard

    def _whole(self, shard: list[torch.Tensor]) -> torch.Tensor:
        """The matrix of a shard: its own memory where that is one block."""
        if self._blocks == [(0, self.rows, self.columns)]:
            return shard[0]
        whole = torch.zeros(self.rows, self.columns, device=self.device, dtype=self.dtype)
        for (first, last, columns), part in zip(self._blocks, shard, strict=True):
            whole[first:last, :columns] = part
        return whole

    def _exchange(self) -> None:
        processes = self._processes
        shard = self._zeroed_shard()
        for number, (block, start, stop) in enumerate(self._pieces()):
            piece = shard[block][start:stop].flatten()
            each = -(-piece.numel() // processes.count)
            ours, *others = processes.exchanged(
                torch.nn.functional.pad(piece, (0, each * processes.count - len(piece)))
            )
            if number == len(self._parts):
                self._parts.append(ours.clone())
            else:
                self._parts[number].add_(ours)
            for other in others:
                self._parts[number].add_(other)
        for part in shard:
            part.zero_()

    def _pieces(self) -> Iterator[tuple[int, int, int]]:
        """Pieces that are exchanged at once: the number of a block, and the first row in it and the last + 1."""
        for number, (first, last, columns) in enumerate(self._blocks):
            step = max(_PIECE // columns, 1)
            for start in range(0, last - first, step):
                yield number, start, min(start + step, last - first)
