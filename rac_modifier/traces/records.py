"""The header and the traces of a store, and its lines: JSON objects whose first key is a checksum of the rest.

    {"crc32":"1f2e3d4c","header":{...}}      the first line
    {"crc32":"5a6b7c8d","trace":{...}}       every other line

The checksum is over the bytes of the value as they are in the file, so checking it needs no re-serialisation.
"""

from __future__ import annotations

import json
import os
import zlib
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from rac_modifier.sampling.engine import EngineRecord
from rac_modifier.sampling.generate import FinishReason
from rac_modifier.settings.problems import ProblemSource
from rac_modifier.settings.sampling import SamplingSettings

# Settings that may differ between the runs that fill one store: they change no trace, only how many there are, or the speed.
_FREE_FIELDS = {"sampling": {"batch_size"}, "problems": {"limit"}}


@dataclass(frozen=True)
class Trace:
    """One sampled chain of thought: the token ids of prompt and completion, with the EOS."""

    id: str
    """"<problem id>#<sample>"."""
    problem_id: str
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    finish_reason: FinishReason
    seed: int
    question: str
    """For review only: calibration reads the ids."""
    answer: str | None
    """The reference answer, where the source has one; used by selections and reports."""

    @property
    def tokens(self) -> int:
        """Prompt and completion tokens together."""
        return len(self.prompt_ids) + len(self.completion_ids)


class StoreHeader(BaseModel):
    """Where the traces of a store come from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["rac-traces"] = "rac-traces"
    version: Literal[1] = 1
    fingerprint: str
    model: str
    tokenizer: str
    chat_template: str | None = None
    sampling: SamplingSettings
    problems: ProblemSource
    engine: EngineRecord = EngineRecord()
    """Both kinds sample the same model, so a run may read a store of either; only the kind that filled it may append."""


def header_differences(stored: StoreHeader, wanted: StoreHeader) -> list[str]:
    """The fields that keep two runs from sharing a store, as "sampling.seed: 0 in the store, 1 asked for"."""
    differences = []
    for name in ("fingerprint", "tokenizer", "chat_template"):
        if getattr(stored, name) != getattr(wanted, name):
            differences.append(_difference(name, getattr(stored, name), getattr(wanted, name)))
    for part, free in _FREE_FIELDS.items():
        old, new = getattr(stored, part).model_dump(), getattr(wanted, part).model_dump()
        for name in old:
            same = old[name] == new[name] or (name == "source" and _one_file(old[name], new[name]))
            if name not in free and not same:
                differences.append(_difference(f"{part}.{name}", old[name], new[name]))
    return differences


def settings_of_record(sampling: SamplingSettings, problems: ProblemSource) -> dict[str, Any]:
    """The settings that decide what is sampled: those that two runs on one store must share."""
    return {
        "sampling": sampling.model_dump(exclude=_FREE_FIELDS["sampling"]),
        "problems": problems.model_dump(exclude=_FREE_FIELDS["problems"]),
    }


def encode(kind: Literal["header", "trace"], value: StoreHeader | Trace) -> bytes:
    """One line of a store, newline included."""
    data = value.model_dump() if isinstance(value, StoreHeader) else vars(value)
    payload = json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode(
        "utf-8", "surrogatepass"
    )
    return _prefix(kind, payload) + payload + b"}\n"


def decode(kind: Literal["header", "trace"], line: bytes) -> dict[str, Any]:
    """The value of one line of a store; `line` is without its newline.

    Raises:
        ValueError: the checksum does not match, or the line is of another kind.
    """
    start = len(_prefix(kind, b""))
    payload = line[start:-1]
    if line[-1:] != b"}" or line[:start] != _prefix(kind, payload):
        raise ValueError("checksum or layout is wrong")
    value = json.loads(payload.decode("utf-8", "surrogatepass"))
    if not isinstance(value, dict):
        raise ValueError(f"a {kind} must be an object")
    return value


def decode_trace(line: bytes) -> Trace:
    """The trace of one line of a store.

    Raises:
        ValueError: as `decode`, or fields are missing or unknown.
    """
    value = decode("trace", line)
    try:
        value["prompt_ids"], value["completion_ids"] = (
            tuple(value["prompt_ids"]),
            tuple(value["completion_ids"]),
        )
        return Trace(**value)
    except (KeyError, TypeError) as error:
        raise ValueError(f"not the fields of a trace: {error}") from error


def _prefix(kind: str, payload: bytes) -> bytes:
    return f'{{"crc32":"{zlib.crc32(payload):08x}","{kind}":'.encode()


def _one_file(first: str, second: str) -> bool:
    """Whether two sources name the same file by different paths."""
    return os.path.isfile(first) and os.path.isfile(second) and os.path.samefile(first, second)


def _difference(name: str, stored: Any, wanted: Any) -> str:
    return f"{name}: {_short(stored)} in the store, {_short(wanted)} asked for"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
