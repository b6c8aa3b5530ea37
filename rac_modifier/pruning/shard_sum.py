"""Sums over a calibration set whose bits do not depend on how many processes share it.

Float32 addition is not associative, so the data fix its order: the calibration set is cut into
shards (`CalibrationLoader.share`), a process adds up a whole shard batch by batch, and the sums of
the shards are added in the order of their numbers,

    S = ((shard 0 + shard 1) + shard 2) + ...

Rank r of N has the shards r, r + N, r + 2 N, ... The first N shards end on all ranks, are exchanged
and added, then the next N. Each rank adds a part of the elements.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from rac_modifier.distributed.processes import ALONE, Processes

Block = tuple[int, int, int]  # first row, last row + 1, number of columns
_PIECE = 1 << 22  # elements per exchange


class ShardSum:
    """A sum of float32 matrices [rows, columns], which are 0 outside of `blocks`."""

    def __init__(
        self,
        rows: int,
        columns: int,
        device: torch.device | str,
        blocks: Sequence[Block] | None = None,
        processes: Processes = ALONE,
    ):
        self.rows, self.columns, self.device = rows, columns, torch.device(device)
        self._processes = processes
        self._blocks = list(blocks or [(0, rows, columns)])
        self._shard: list[Tensor] | None = None
        self._open = False  # whether something was added since the last shard ended
        self._total: Tensor | None = None
        self._parts: list[Tensor] = []  # of S by piece, with several processes

    @property
    def shard(self) -> list[Tensor]:
        """Return the sum of the present shard, block by block, to be added to in place."""
        self._open = True
        return self._present()

    @property
    def total(self) -> Tensor:
        """Return the sum of all shards; with several processes, after `finish`."""
        if self._total is None:
            assert not self._parts, "finish joins the parts of several processes"
            return self._whole(self._present())
        assert not self._open, "the last shard was not ended"
        return self._total

    def take(self) -> Tensor:
        """Return the sum of all shards to be changed in place, and drop it here."""
        total = self.total
        self._total = self._shard = None
        return total

    def end_shard(self) -> None:
        """Add the shard to the sum, on all ranks; a rank without a shard left adds zeros."""
        if self._processes.count > 1:
            self._exchange()
        elif self._total is None:
            self._total, self._shard = self._whole(self._present()), None
        else:
            for (first, last, columns), part in zip(self._blocks, self._present(), strict=True):
                self._total[first:last, :columns].add_(part)  # S += the shard, block by block
                part.zero_()
        self._open = False

    def finish(self) -> None:
        """Give all ranks the whole sum, with the same bits; without an ended shard, end one."""
        if self._total is None and not self._parts:
            self.end_shard()
        assert not self._open, "the last shard was not ended"
        self._shard = None
        # each rank has added its part of every piece; joined, all have the same bits
        if self._parts:
            self._total = self._zeros(self.rows, self.columns)
            for (block, start, stop), part in zip(self._pieces(), self._parts, strict=True):
                first, _, columns = self._blocks[block]
                piece = self._total[first + start : first + stop, :columns]
                piece.copy_(self._processes.joined(part)[: piece.numel()].view_as(piece))
            self._parts = []

    def _zeros(self, rows: int, columns: int) -> Tensor:
        return torch.zeros(rows, columns, device=self.device)

    def _present(self) -> list[Tensor]:
        if self._shard is None:
            self._shard = [self._zeros(last - first, width) for first, last, width in self._blocks]
        return self._shard

    def _whole(self, shard: list[Tensor]) -> Tensor:
        """Return the matrix of a shard, in the shard's memory if it is one block."""
        if self._blocks == [(0, self.rows, self.columns)]:
            return shard[0]
        matrix = self._zeros(self.rows, self.columns)
        for (first, last, columns), part in zip(self._blocks, shard, strict=True):
            matrix[first:last, :columns] = part
        return matrix

    def _exchange(self) -> None:
        count, shard = self._processes.count, self._present()
        for number, (block, start, stop) in enumerate(self._pieces()):
            piece = shard[block][start:stop].flatten()
            padding = -len(piece) % count  # to equal parts, one per rank
            # this rank's part of the piece from all ranks, added in the order of shard numbers
            first, *later = self._processes.exchanged(torch.nn.functional.pad(piece, (0, padding)))
            if number == len(self._parts):
                self._parts.append(first.clone())
            else:
                self._parts[number].add_(first)
            for part in later:
                self._parts[number].add_(part)
        for part in shard:
            part.zero_()

    def _pieces(self) -> Iterator[tuple[int, int, int]]:
        """Yield the pieces of an exchange: number of a block, first row in it, last row + 1."""
        for number, (first, last, columns) in enumerate(self._blocks):
            step = -(-_PIECE // columns)
            rows = range(last - first)
            for start in rows[::step]:
                yield number, start, min(start + step, len(rows))
