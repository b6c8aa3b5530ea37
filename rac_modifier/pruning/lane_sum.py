"""Sums over a calibration set whose bits do not depend on how many processes share it.

Float32 addition is not associative, so a sum depends on the order of its terms. Here the order is fixed by the data: the
calibration set is cut into lanes (`CalibrationLoader.share`), a process adds up whole lanes batch by batch, and the sums of the
lanes are added in the order of their numbers,

    S = ((lane 0 + lane 1) + lane 2) + ...

whichever process has which. Of N processes, number r has the lanes r, r + N, r + 2 N, ... So the first N lanes end in all of
them, are exchanged and added, then the next N. Each adds a part of the elements, and so keeps one lane and its part of S.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from rac_modifier.processes import ALONE, Processes

Block = tuple[int, int, int]
_PIECE = 1 << 22  # elements that are exchanged at once


class LaneSum:
    """A sum of matrices [rows, columns]: batches are added to `lane`, and `end_lane` adds that to the sum of the lanes before.

    `blocks` are the parts of the matrices that are used, as (first row, last row + 1, number of columns). A lane has no memory
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
        self._lane: list[torch.Tensor] | None = None
        self._open = False  # whether something was added since the last lane ended
        self._total: torch.Tensor | None = None
        self._parts: list[
            torch.Tensor
        ] = []  # with several processes, of each piece what this one adds up

    @property
    def lane(self) -> list[torch.Tensor]:
        """The sum of the present lane, block by block, to be added to in place."""
        self._open = True
        return self._zeroed_lane()

    @property
    def total(self) -> torch.Tensor:
        """The sum of all lanes; with several processes, after `finish`. What is in no block is zero."""
        if self._total is None:
            assert not self._parts, "the parts of several processes are put together by finish"
            return self._whole(self._zeroed_lane())
        assert not self._open, "the last lane was not ended"
        return self._total

    def take(self) -> torch.Tensor:
        """The sum of all lanes, to be changed in place: it is gone from here."""
        total = self.total
        self._total = self._lane = None
        return total

    def end_lane(self) -> None:
        """Add the lane to the sum, in all processes, each with a lane of its own (without a batch, where there are no more)."""
        if self._processes.count > 1:
            self._exchange()
        elif self._total is None:
            self._total, self._lane = self._whole(self._zeroed_lane()), None
        else:
            for (first, last, columns), part in zip(self._blocks, self._zeroed_lane(), strict=True):
                self._total[first:last, :columns].add_(part)
                part.zero_()
        self._open = False

    def finish(self) -> None:
        """After the last lane: the whole sum in all processes, with the same bits. If none has ended, this ends one."""
        if self._total is None and not self._parts:
            self.end_lane()
        assert not self._open, "the last lane was not ended"
        self._lane = None
        if self._parts:
            self._total = torch.zeros(self.rows, self.columns, device=self.device, dtype=self.dtype)
            for (block, start, stop), part in zip(self._pieces(), self._parts, strict=True):
                first, _, columns = self._blocks[block]
                piece = self._total[first + start : first + stop, :columns]
                piece.copy_(self._processes.joined(part)[: piece.numel()].view_as(piece))
            self._parts = []

    def _zeroed_lane(self) -> list[torch.Tensor]:
        """That of the present lane; zeros where it has none yet."""
        if self._lane is None:
            self._lane = [
                torch.zeros(last - first, columns, device=self.device, dtype=self.dtype)
                for first, last, columns in self._blocks
            ]
        return self._lane

    def _whole(self, lane: list[torch.Tensor]) -> torch.Tensor:
        """The matrix of a lane: its own memory where that is one block."""
        if self._blocks == [(0, self.rows, self.columns)]:
            return lane[0]
        whole = torch.zeros(self.rows, self.columns, device=self.device, dtype=self.dtype)
        for (first, last, columns), part in zip(self._blocks, lane, strict=True):
            whole[first:last, :columns] = part
        return whole

    def _exchange(self) -> None:
        processes = self._processes
        lane = self._zeroed_lane()
        for number, (block, start, stop) in enumerate(self._pieces()):
            piece = lane[block][start:stop].flatten()
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
        for part in lane:
            part.zero_()

    def _pieces(self) -> Iterator[tuple[int, int, int]]:
        """Pieces that are exchanged at once: the number of a block, and the first row in it and the last + 1."""
        for number, (first, last, columns) in enumerate(self._blocks):
            step = max(_PIECE // columns, 1)
            for start in range(0, last - first, step):
                yield number, start, min(start + step, last - first)
