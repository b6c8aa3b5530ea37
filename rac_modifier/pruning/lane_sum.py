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

from rac_modifier.processes import Processes

_PIECE = 1 << 22  # elements that are exchanged at once


class LaneSum:
    """A sum of matrices [rows, columns]: batches are added to `lane`, and `end_lane` adds that to the sum of the lanes before.

    `blocks` are the parts of the matrices that are used, as (first row, last row + 1, number of columns).
    """

    def __init__(
        self,
        rows: int,
        columns: int,
        device: torch.device | str,
        dtype: torch.dtype = torch.float32,
        blocks: Sequence[tuple[int, int, int]] | None = None,
    ):
        self.rows, self.columns, self.dtype, self.device = rows, columns, dtype, torch.device(device)
        self._blocks = blocks or [(0, rows, columns)]
        self._lane: torch.Tensor | None = self._zeros()
        self._open = False  # whether something was added since the last lane ended
        self._total: torch.Tensor | None = None
        self._parts: list[torch.Tensor] = []  # with several processes, of each piece what this one adds up

    @property
    def lane(self) -> torch.Tensor:
        """The sum of the present lane, to be added to in place."""
        if self._lane is None:
            self._lane = self._zeros()
        self._open = True
        return self._lane

    @property
    def total(self) -> torch.Tensor:
        """The sum of all lanes; with several processes, after `finish`."""
        if self._total is None:
            assert self._lane is not None
            assert not self._parts, "the parts of several processes are put together by finish"
            return self._lane
        assert not self._open, "the last lane was not ended"
        return self._total

    def take(self) -> torch.Tensor:
        """The sum of all lanes, to be changed in place: it is gone from here."""
        total = self.total
        self._total = self._lane = None
        return total

    def end_lane(self, processes: Processes) -> None:
        """Add the lane to the sum, in all processes, each with a lane of its own (without a batch, where there are no more)."""
        if processes.count > 1:
            self._exchange(processes)
        elif self._total is None:
            self._total, self._lane = self.lane, None
        else:
            assert self._lane is not None
            for first, last, columns in self._blocks:
                self._total[first:last, :columns].add_(self._lane[first:last, :columns])
            self._lane.zero_()
        self._open = False

    def finish(self, processes: Processes) -> None:
        """After the last lane: the whole sum in all processes, with the same bits. If none has ended, this ends one."""
        if self._total is None and not self._parts:
            self.end_lane(processes)
        assert not self._open, "the last lane was not ended"
        if self._parts:
            assert self._lane is not None
            for (first, last, columns), part in zip(self._pieces(), self._parts, strict=True):
                piece = self._lane[first:last, :columns]
                piece.copy_(processes.joined(part)[: piece.numel()].view_as(piece))
            self._total, self._parts = self._lane, []
        self._lane = None

    def _zeros(self) -> torch.Tensor:
        return torch.zeros(self.rows, self.columns, device=self.device, dtype=self.dtype)

    def _exchange(self, processes: Processes) -> None:
        lane = self.lane
        for number, (first, last, columns) in enumerate(self._pieces()):
            piece = lane[first:last, :columns].flatten()
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
        lane.zero_()

    def _pieces(self) -> Iterator[tuple[int, int, int]]:
        """The blocks, cut into pieces that are exchanged at once."""
        for first, last, columns in self._blocks:
            step = max(_PIECE // columns, 1)
            for start in range(first, last, step):
                yield start, min(start + step, last), columns
