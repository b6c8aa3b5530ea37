"""What a user sets about the problems that the model is asked."""

from typing import Self

from pydantic import Field, field_validator, model_validator

from rac_modifier.errors import RacError
from rac_modifier.settings.check import Count, Settings, refuse_idle

ARITHMETIC = "arithmetic"
GYM_PREFIX = "reasoning-gym:"
FILE_SUFFIXES = (".jsonl", ".json", ".parquet")
_OTHER_TABLES = (".csv", ".tsv", ".xlsx")  # without types: an answer 007 would become 7


class ProblemSource(Settings):
    """Which problems the model is asked.

    `source` is "arithmetic" (the calibration split of the built-in tasks), "reasoning-gym:gcd" or
    "reasoning-gym:chain_sum,gcd" (one task after the other in turn), a path that ends in .jsonl,
    .json or .parquet, or else the id of a Hugging Face dataset. Generated problems never end; the
    others are finite and shuffled by the seed.
    """

    source: str = Field(ARITHMETIC, min_length=1)
    """arithmetic, reasoning-gym:<task>, a file, or a dataset id."""

    column: str | None = None
    """Column of the question; default: the only one named problem, question or prompt."""

    answer_column: str | None = None
    """Column of the reference answer; stored with each trace, and used to check answers."""

    split: str = "train"
    """Split of a Hugging Face dataset."""

    config: str | None = None
    """Configuration of a Hugging Face dataset."""

    limit: Count | None = None
    """Use at most this many problems."""

    max_prompt_tokens: Count | None = None
    """Skip problems with a longer prompt, and list them as failed; no prompt is cut."""

    @property
    def is_generator(self) -> bool:
        """Return whether the problems are generated, without end, rather than read from a table."""
        return self.source == ARITHMETIC or self.source.startswith(GYM_PREFIX)

    @property
    def is_file(self) -> bool:
        """Return whether `source` is a path to a file of problems."""
        return not self.is_generator and self.source.endswith(FILE_SUFFIXES)

    @field_validator("source")
    @classmethod
    def _is_read(cls, source: str) -> str:
        if source.lower().endswith(_OTHER_TABLES):
            raise RacError(
                f"{source!r} is no table that is read; save it as one of {', '.join(FILE_SUFFIXES)}"
            )
        return source

    @model_validator(mode="after")
    def _only_settings_that_apply(self) -> Self:
        if not (self.is_generator or self.is_file):
            return self
        kind = "generates its problems" if self.is_generator else "is a file"
        names = ["config", "split", *(["column", "answer_column"] if self.is_generator else [])]
        why = f"since source {self.source!r} {kind}"
        refuse_idle(self, (True, " ".join(names), why))
        return self
