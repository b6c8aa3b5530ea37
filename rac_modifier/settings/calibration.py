"""What a user sets about calibration: the budget, the mixture that fills it, and token weights."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, WithJsonSchema, field_validator, model_validator

from rac_modifier.errors import RacError
from rac_modifier.settings.check import Count, Seed, Settings

Kind = Literal["traces", "prompts", "generic"]
KINDS: tuple[Kind, ...] = ("traces", "prompts", "generic")
_SYNONYMS = {"text": "generic"}
# A comma inside a name ("reasoning-gym:gcd,chain_sum") does not end a part.
_BETWEEN_PARTS = re.compile(r"\s*,\s*(?=(?:traces|prompts|generic|text)\s*[:@])")
_EXAMPLE = 'write it like "traces:math@0.7, traces:code@0.2, text:allenai/c4@0.1"'

TEXT_FILES = (".txt", ".jsonl", ".parquet")
_Sequence = Annotated[int, Field(ge=16, le=10**9)]


@dataclass(frozen=True)
class Part:
    """One part of the calibration set; without a name it is `traces` or `calibration.generic`."""

    kind: Kind
    name: str | None = None

    @classmethod
    def parse(cls, key: str) -> Self:
        """Read "traces", "traces:math" or "text:allenai/c4" (RacError: another kind)."""
        word, colon, name = (piece.strip() for piece in key.partition(":"))
        kind = _SYNONYMS.get(word, word)
        if kind not in KINDS or (colon and not name):
            raise RacError(f"mixture names {key!r}; the kinds are {', '.join(KINDS)}; {_EXAMPLE}")
        return cls(kind, name or None)

    @property
    def key(self) -> str:
        """Return the part as it is written in a mixture."""
        return self.kind if self.name is None else f"{self.kind}:{self.name}"


def read_mixture(value: Any) -> Any:
    """Return a mixture as a mapping, also from a line of text (RacError: a part has no share)."""
    if not isinstance(value, str):
        return value
    mixture: dict[str, float] = {}
    for part in _BETWEEN_PARTS.split(value.strip().rstrip(",")):
        key, _, share = part.rpartition("@")
        try:
            mixture[key.strip()] = mixture.get(key.strip(), 0.0) + float(share)
        except ValueError as error:
            raise RacError(f"mixture: {part!r} has no share; {_EXAMPLE}") from error
    return mixture


def part_tokens(mixture: Mapping[str, float], tokens: int) -> dict[str, int]:
    """Return the budget of each part, rounded so that all of them sum to `tokens`."""
    budgets = {key: round(tokens * share) for key, share in mixture.items()}
    *_, last = mixture
    budgets[last] += tokens - sum(budgets.values())
    return budgets


_SHARES = {"type": "object", "additionalProperties": {"type": "number"}}
Mixture = Annotated[
    dict[str, float],
    BeforeValidator(read_mixture),
    WithJsonSchema({"anyOf": [_SHARES, {"type": "string"}]}),
]


class GenericText(Settings):
    """Text that is not related to the problems, as usual calibration sets have it."""

    source: str = "python-docs"
    """python-docs (documentation that is part of Python), a .txt, .jsonl or .parquet file, or a
    Hugging Face dataset."""

    column: str | None = None
    """The column with the text; not for python-docs or .txt."""

    split: str = "train"
    """Split of a Hugging Face dataset."""

    config: str | None = None
    """Configuration of a Hugging Face dataset."""

    sequence_tokens: _Sequence = 512
    """Tokens per sequence into which the text is cut."""


class CalibrationSettings(Settings):
    """What is calibrated on, how it is batched, and what each token weighs."""

    tokens: Count = 262_144
    """Budget of real tokens (padding never counts). The run says whether more could help."""

    mixture: Mixture = {"traces": 1.0}
    """Share of the budget per part: traces (prompts with their chains of thought), prompts or
    generic (also written text), with or without the name of a source. A mapping or one line:
    "traces:math@0.7, traces:code@0.2, text:allenai/c4@0.1"."""

    max_sequence_tokens: _Sequence | None = None
    """Longer sequences are cut to this many tokens, and counted as truncated; default: none is."""

    held_out_tokens: int = Field(2048, ge=0, le=10**9)
    """Traces of about this many tokens, of four problems at least, are not calibrated on: the
    record has the pruned model's divergence on them; 0: not measured."""

    generic: GenericText = GenericText()
    """The text of the part generic."""

    seed: Seed = 0
    """Decides which sequences of each part are taken, and the order of the batches."""

    batch_tokens: _Sequence = 16_384
    """Sequences times length of a padded batch at most."""

    @field_validator("mixture")
    @classmethod
    def _known_shares(cls, mixture: dict[str, float]) -> dict[str, float]:
        shares: dict[Part, float] = {}
        for key, share in mixture.items():
            if not 0 <= share <= 1:
                raise RacError(f"mixture gives {key} the share {share}; use a number from 0 to 1")
            part = Part.parse(key)
            shares[part] = shares.get(part, 0.0) + share
        total = sum(shares.values())
        if abs(total - 1) > 1e-6:
            raise RacError(f"shares of mixture {mixture} sum to {total:g}; make them sum to 1")
        by_kind = sorted(shares, key=lambda part: KINDS.index(part.kind))
        return {part.key: shares[part] for part in by_kind if shares[part] > 0}

    @model_validator(mode="after")
    def _texts_are_known(self) -> Self:
        for part in self.parts("generic"):
            self.text(part.name)
        return self

    def parts(self, *kinds: Kind) -> list[Part]:
        """Return the parts of these kinds that have a share."""
        return [part for part in map(Part.parse, self.mixture) if part.kind in kinds]

    def share(self, kind: Kind) -> float:
        """Return the share of the budget over all parts of one kind."""
        return sum(self.mixture[part.key] for part in self.parts(kind))

    def text(self, name: str | None) -> GenericText:
        """Return `generic`, or the text of this name in the mixture (RacError: no text)."""
        if name is None:
            return self.generic
        if name != "python-docs" and "/" not in name and not name.endswith(TEXT_FILES):
            raise RacError(
                f"mixture names text:{name}, which is no text: name python-docs, a file or a "
                "dataset id"
            )
        return GenericText(source=name)
