"""The header and the traces of a store, and its lines: JSON objects that begin with a checksum.

{"crc32":"1f2e3d4c","header":{...}} is the first line, {"crc32":"5a6b7c8d","trace":{...}} every
other one. The checksum is over the bytes of the value as they are in the file.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, BinaryIO, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from transformers import PreTrainedTokenizerBase

from rac_modifier.errors import RacError
from rac_modifier.measure.repeats import end_of_copies, repeated_tail
from rac_modifier.runtime.files import regular_file
from rac_modifier.sampling.engine import EngineRecord
from rac_modifier.sampling.generate import FinishReason
from rac_modifier.sampling.model_identity import ModelIdentity, tokenizer_fingerprint
from rac_modifier.settings.problems import ProblemSource
from rac_modifier.settings.sampling import SamplingSettings

LONGEST_LINE = 1 << 25  # bytes, about four million tokens
_BEGINNING = b'{"crc32":"'  # of every store, of other versions too

TokenIds = tuple[Annotated[int, Field(ge=0)], ...]


@dataclass(frozen=True)
class Trace:
    """One sampled chain of thought: the token ids of prompt and completion, with the EOS."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")
    id: str  # "<problem id>#<sample>"
    problem_id: str
    prompt_ids: TokenIds
    completion_ids: TokenIds
    finish_reason: FinishReason
    seed: int
    question: str  # for review only: calibration reads the ids
    answer: str | None  # the reference answer, if the source has it

    @staticmethod
    def of(fields: dict[str, Any]) -> Trace:
        """Return the trace with these fields, as JSON has them."""
        try:
            trace = _TRACE.validate_python(fields)
            # a lone surrogate is an error
            f"{trace.id}{trace.problem_id}{trace.question}{trace.answer}".encode()
            return trace
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"]))
            raise ValueError(f"not the fields of a trace: {field}: {first['msg']}") from error

    @property
    def tokens(self) -> int:
        """Return prompt and completion tokens together."""
        return len(self.prompt_ids) + len(self.completion_ids)

    @property
    def sequence(self) -> tuple[tuple[int, ...], int]:
        """Return all token ids, and the length of the prompt."""
        return (*self.prompt_ids, *self.completion_ids), len(self.prompt_ids)

    @property
    def repeated_tokens(self) -> int:
        """Count the repeated tokens at the end of a truncated completion; 0 if it ended."""
        return repeated_tail(self.completion_ids, self.finish_reason)

    def without_repeats(self) -> Self:
        """Cut a repeating tail down to its first copy; without one return this trace."""
        tail = self.repeated_tokens
        return replace(self, completion_ids=self.completion_ids[:-tail]) if tail else self

    def with_copies(self) -> Self:
        """Cut a repeating tail to a few copies, on which recovery trains."""
        end = end_of_copies(self.completion_ids) if self.finish_reason == "length" else None
        return self if end is None else replace(self, completion_ids=self.completion_ids[:end])


_TRACE = TypeAdapter(Trace)


class StoreHeader(BaseModel, extra="forbid", frozen=True):
    """Where the traces of a store come from."""

    format: Literal["rac-traces"] = "rac-traces"
    version: Literal[1] = 1
    fingerprint: str
    model: str
    tokenizer: str
    chat_template: str | None = None
    sampling: SamplingSettings
    problems: ProblemSource
    engine: EngineRecord = EngineRecord()  # only an engine of this kind may append

    @classmethod
    def of(
        cls,
        identity: ModelIdentity,
        tokenizer: PreTrainedTokenizerBase,
        sampling: SamplingSettings,
        problems: ProblemSource,
    ) -> StoreHeader:
        """Make the header of a store of this model's traces; `sampling` must be resolved."""
        template = hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()[:12]
        return cls(
            fingerprint=identity.fingerprint,
            model=identity.name,
            tokenizer=tokenizer_fingerprint(tokenizer),
            chat_template=template if sampling.template == "chat" else None,
            sampling=sampling,
            problems=problems,
        )

    def deciding(self) -> dict[str, dict[str, Any]]:
        """Return the settings that decide a trace; batch_size and limit do not."""
        exclude = {"sampling": {"batch_size"}, "problems": {"limit"}}
        return self.model_dump(include={"sampling", "problems"}, exclude=exclude)

    def path(self, folder: str, setup: str | None = None) -> Path:
        """Return folder/<fingerprint>-<hash of what decides a trace>.jsonl, or with the setup."""
        text = json.dumps(self.deciding(), sort_keys=True)
        names = [self.fingerprint[:12], hashlib.sha256(text.encode()).hexdigest()[:12]]
        return Path(folder, "-".join(names if setup is None else [*names, setup]) + ".jsonl")

    def differences(self, current: StoreHeader) -> list[str]:
        """List what keeps two runs from sharing a store: "seed: 0 in the file, 1 asked for"."""
        names = ("fingerprint", "tokenizer", "chat_template")
        pairs = [(name, getattr(self, name), getattr(current, name)) for name in names]
        now = current.deciding()
        for section, values in self.deciding().items():
            pairs += [
                (f"{section}.{name}", old, now[section][name]) for name, old in values.items()
            ]
        return [
            f"{name}: {_short(old)} in the file, {_short(new)} asked for"
            for name, old, new in pairs
            if old != new
        ]

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Self | None:
        """Read the header of a store; None if the file is missing, or ends within its first line.

        RacError if the file is no trace store of this version.
        """
        path = Path(path)
        if not path.exists():
            return None
        try:
            with regular_file(path, "file of traces or answers").open("rb") as file:
                line = read_line(file, path)
            if line.endswith(b"\n"):
                return cls(**decode("header", line[:-1]))
        except (OSError, ValueError) as error:
            if isinstance(error, RacError):
                raise
            reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
            raise RacError(
                f"{str(path)!r} is no file of traces or answers of this version ({reason}); name "
                "another file"
            ) from error
        # Only what looks like our own beginning may be overwritten.
        if line and not line.startswith(_BEGINNING[: len(line)]) and line.strip(b"\0"):
            raise RacError(f"{str(path)!r} is no file of traces or answers; name another file")
        return None

    @staticmethod
    def is_in(path: Path) -> bool:
        """Tell whether a file begins as a trace store does, of whatever version."""
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return file.read(len(_BEGINNING)) == _BEGINNING


def encode(kind: Literal["header", "trace"], value: StoreHeader | Trace) -> bytes:
    """Return a line of a store, newline included."""
    data = value.model_dump() if isinstance(value, StoreHeader) else vars(value)
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    payload = text.encode("utf-8", "surrogatepass")
    return _prefix(kind, payload) + payload + b"}\n"


def decode(kind: Literal["header", "trace"], line: bytes) -> dict[str, Any]:
    """Return the value of a line of a store; `line` is without its newline."""
    start = len(_prefix(kind, b""))
    payload = line[start:-1]
    if line[-1:] != b"}" or line[:start] != _prefix(kind, payload):
        raise ValueError("checksum or layout is wrong")
    try:
        value = json.loads(payload.decode("utf-8", "surrogatepass"))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError(f"a {kind} must be an object")
    return value


def read_line(file: BinaryIO, path: Path) -> bytes:
    """Read a line with its newline, b"" at the end; a line too long for a trace is a RacError."""
    line = file.readline(LONGEST_LINE + 1)
    if len(line) > LONGEST_LINE:
        raise RacError(
            f"{str(path)!r} is no file of traces or answers: a line of it has more than "
            f"{LONGEST_LINE:,} bytes"
        )
    return line


def _prefix(kind: str, payload: bytes) -> bytes:
    return f'{{"crc32":"{zlib.crc32(payload):08x}","{kind}":'.encode()


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
