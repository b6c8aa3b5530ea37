"""The trace store: an append-only JSONL file, valid after a kill of its writer; side files.

Next to x.jsonl there may be x.pending.jsonl, a store of traces that finished before an earlier one,
and x.failed.jsonl, which has a JSON object per failed problem.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Container, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Self

from loguru import logger

from rac_modifier.errors import RacError, refusing
from rac_modifier.runtime.files import lock, regular_file
from rac_modifier.traces.records import StoreHeader, Trace, decode, encode, read_line

_PATIENCE = 10.0  # seconds that another process may hold the lock: it may only read the traces


@dataclass
class TraceCounts:
    """The size of a store; `finished` counts the traces that ended with an EOS."""

    traces: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finished: int = 0

    @property
    def tokens(self) -> int:
        """Return prompt and completion tokens together."""
        return self.prompt_tokens + self.completion_tokens


class TraceStore(AbstractContextManager["TraceStore"]):
    """Traces of one model under one set of sampling settings and problems.

    Every line is checked when it is opened. In memory are ids and token counts.
    """

    def __init__(self, path: Path, header: StoreHeader, fd: int | None = None):
        self.path, self.header = path, header
        self._fd, self._end = fd, 0
        self.tokens_by_id: dict[str, int] = {}
        self.counts = TraceCounts()
        self.largest_id = -1  # of all token ids

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> TraceStore:
        """Open a store for reading, without an incomplete last line: its writer may be at work.

        RacError if there is no such file, it is no store, or a line is corrupt.
        """
        path = Path(path)
        header = StoreHeader.read(path)
        if header is None:
            raise RacError(f"trace store {str(path)!r} does not exist or holds no header")
        store = cls(path, header)
        store._scan()
        return store

    @classmethod
    def open_append(cls, path: str | os.PathLike[str], header: StoreHeader) -> TraceStore:
        """Open a store to append, or create it; locked for other writers until `close`.

        RacError if another process uses it, its header differs, a line is corrupt, or it cannot be
        written.
        """
        path = Path(path)
        if path.exists():
            regular_file(path, "file of traces or answers")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except (OSError, ValueError) as error:  # ValueError: a NUL byte in the path
            raise RacError(
                f"{str(path)!r} cannot be opened for writing "
                f"({getattr(error, 'strerror', error)}); name a file that can be written"
            ) from error
        store = cls(path, header, fd)
        try:
            if not lock(fd, path, _PATIENCE):
                raise RacError(f"{str(path)!r} is in use by another process; wait for it to end")
            store._open_locked(header)
        except BaseException:
            store.close()
            raise
        return store

    def append_many(self, traces: Sequence[Trace]) -> None:
        """Append traces with one write and fsync (RacError: disk full; the file is cut back)."""
        for trace in traces:
            assert trace.id not in self.tokens_by_id, f"trace {trace.id} is stored already"
        if traces:
            self._write(b"".join(encode("trace", trace) for trace in traces))
            for trace in traces:
                self._count(trace)

    def close(self) -> None:
        """Release the lock; the store stays readable."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def __exit__(self, *error: object) -> None:
        self.close()

    def __len__(self) -> int:
        return self.counts.traces

    def __contains__(self, trace_id: object) -> bool:
        return trace_id in self.tokens_by_id

    def __iter__(self) -> Iterator[Trace]:
        """Return the traces in the order of the file, read one at a time."""
        with self.path.open("rb") as file:
            read_line(file, self.path)
            number = 1
            while file.tell() < self._end:
                number += 1
                yield self._decode(read_line(file, self.path), number)

    @staticmethod
    def pending_path(store: Path) -> Path:
        """Return traces.pending.jsonl for traces.jsonl."""
        return store.with_name(f"{store.stem}.pending.jsonl")

    def sha256(self) -> str:
        """Hash the file's valid part, for the run record."""
        digest = hashlib.sha256()
        with self.path.open("rb") as file:
            while block := file.read(min(self._end - file.tell(), 1 << 20)):
                digest.update(block)
        return digest.hexdigest()

    def used(self, hashes: Collection[str]) -> int:
        """Count the first traces, of which an earlier run recorded one of the hashes."""
        digest, used = hashlib.sha256(), 0
        with self.path.open("rb") as file:
            digest.update(file.readline())  # the header
            for number in range(1, len(self) + 1):
                digest.update(file.readline())
                if digest.hexdigest() in hashes:
                    used = number
        return used

    def fresh(self, used: int, tokens: int) -> list[Trace]:
        """Return whole traces of `tokens` tokens, counted without repeating tails, after `used`."""
        chosen: list[Trace] = []
        for trace in islice(self, used, None):
            if tokens <= 0:
                break
            chosen.append(trace)
            tokens -= trace.without_repeats().tokens
        return chosen

    def _open_locked(self, header: StoreHeader) -> None:
        stored = StoreHeader.read(self.path)
        if stored is None:
            self._truncate()  # a header cut short by a kill: no trace was stored yet
            self._write(encode("header", header))
            directory = os.open(self.path.parent, os.O_RDONLY)
            os.fsync(directory)  # the name of the new file
            os.close(directory)
            return
        if differences := stored.differences(header):
            raise RacError(
                f"{str(self.path)!r} was filled under other settings "
                f"({'; '.join(differences)}); use these, or name another file"
            )
        self.header = stored
        torn = self._scan()
        if torn:
            logger.warning(
                f"{str(self.path)!r}: a killed run left a last line of {torn} bytes: "
                f"removed it, {len(self)} traces kept"
            )
            self._truncate()

    def _scan(self) -> int:
        """Check and count every line; return the bytes of an incomplete last line."""
        with self.path.open("rb") as file:
            self._end = len(read_line(file, self.path))
            number = 1
            while line := read_line(file, self.path):
                number += 1
                if not line.endswith(b"\n"):
                    return len(line)
                self._count(self._decode(line, number, seen=self.tokens_by_id))
                self._end += len(line)
        return 0

    def _decode(self, line: bytes, number: int, seen: Container[str] = ()) -> Trace:
        try:
            trace = Trace.of(decode("trace", line.rstrip(b"\n")))
            if trace.id in seen:
                raise ValueError(f"trace {trace.id!r} is there twice")
        except ValueError as error:
            raise RacError(
                f"{str(self.path)!r}, line {number} is corrupt: {error}. Remove that "
                f"line (`sed -i {number}d {self.path}`) and run the command again"
            ) from error
        return trace

    def _count(self, trace: Trace) -> None:
        self.tokens_by_id[trace.id] = trace.tokens
        self.counts.traces += 1
        self.counts.prompt_tokens += len(trace.prompt_ids)
        self.counts.completion_tokens += len(trace.completion_ids)
        self.counts.finished += trace.finish_reason == "stop"
        self.largest_id = max(self.largest_id, *trace.prompt_ids, *trace.completion_ids)

    def _write(self, data: bytes) -> None:
        assert self._fd is not None, "open the store with TraceStore.open_append"
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(self._fd, view) :]
            os.fsync(self._fd)
        except OSError as error:
            self._truncate()
            raise RacError(
                f"{str(self.path)!r} cannot be written ({error.strerror}); the "
                f"{len(self)} traces stored before are kept: make room, then run again"
            ) from error
        self._end += len(data)

    def _truncate(self) -> None:
        assert self._fd is not None
        os.ftruncate(self._fd, self._end)


@dataclass(frozen=True)
class FailedProblem:
    """A trace that is missing from its store; `id` is the trace's."""

    id: str
    question: str
    reason: str

    @staticmethod
    def path(store: Path) -> Path:
        """Return traces.failed.jsonl for traces.jsonl."""
        return store.with_name(f"{store.stem}.failed.jsonl")

    @classmethod
    def read(cls, store: Path) -> list[Self]:
        """Read the failed problems of a store, without a line that a kill cut short."""
        path = cls.path(store)
        if not path.exists():
            return []
        problem = f"{str(path)!r} is not a list of failed problems"
        damage = (OSError, ValueError, TypeError, RecursionError)
        with refusing(problem, "remove it to try them again", *damage):
            text = regular_file(path, "list of failed problems").read_bytes()
            lines = text[: text.rfind(b"\n") + 1].splitlines()
            return [cls(**json.loads(line)) for line in lines if line.strip()]

    @classmethod
    def append(cls, store: Path, failed: Sequence[Self]) -> None:
        """Append failed problems of a locked store; they are on the disk when this returns."""
        path = cls.path(store)
        lines = "".join(json.dumps(asdict(problem)) + "\n" for problem in failed)
        with (
            refusing(f"{str(path)!r} cannot be written", "make room", OSError),
            path.open("ab+") as file,
        ):
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
            file.write(lines.encode())
            file.flush()
            os.fsync(file.fileno())
