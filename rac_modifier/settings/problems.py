"""What a user sets about the problems that are put to the model."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from rac_modifier.errors import RacError

ARITHMETIC = "arithmetic"


GYM_PREFIX = "reasoning-gym:"


# What to set for the data sets of the paper, where a user sets nothing.
PRESETS: dict[str, dict[str, str]] = {
    "open-r1/OpenR1-Math-220k": {"column": "problem", "answer_column": "answer"},
    # Its default configuration has no column that asks the whole question; it has no answers, only tests.
    "open-r1/codeforces": {"config": "verifiable-prompts", "column": "prompt"},
}


class ProblemSource(BaseModel):
    """Which problems to put to the model.

    `source` is "arithmetic" (the calibration split of the built-in tasks, no download), "reasoning-gym:chain_sum" or
    "reasoning-gym:chain_sum,gcd" (generated, tasks in turn), a path that ends in .jsonl, .json or .parquet, or else the
    id of a Hugging Face dataset. The generators never end; the others are finite and shuffled by the seed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str = Field(
        default=ARITHMETIC, min_length=1, description="arithmetic, reasoning-gym:<task>, a file, or a dataset id"
    )
    column: str | None = Field(
        default=None, description="column of the question; needed unless one of problem/question/prompt"
    )
    answer_column: str | None = Field(default=None, description="column of the answer, kept for review")
    split: str = Field(default="train", description="split of a Hugging Face dataset")
    config: str | None = Field(default=None, description="configuration of a Hugging Face dataset")
    limit: int | None = Field(default=None, ge=1, description="use at most this many problems")
    max_prompt_tokens: int | None = Field(
        default=None, ge=1, description="pass over problems whose prompt is longer, and note them; none is ever cut"
    )

    @property
    def is_generator(self) -> bool:
        """Whether the problems are generated, without end, rather than read from a table."""
        return self.source == ARITHMETIC or self.source.startswith(GYM_PREFIX)

    @property
    def is_file(self) -> bool:
        """Whether `source` is a path to a file of problems."""
        return not self.is_generator and self.source.endswith(FILE_SUFFIXES)

    @classmethod
    def looks_like(cls, name: str) -> bool:
        """Whether a name by itself is a source of problems, rather than a name that somebody gave to one."""
        one = cls(source=name)
        return one.is_generator or one.is_file or "/" in name

    @model_validator(mode="before")
    @classmethod
    def _preset_fills_in(cls, values: Any) -> Any:
        if isinstance(values, dict) and (preset := PRESETS.get(str(values.get("source")))):
            given = {name: value for name, value in values.items() if value is not None}
            if preset.keys() & {"config"} and given.get("config", preset["config"]) != preset["config"]:
                return values  # another configuration has other columns
            return {**values, **preset, **given}
        return values

    @model_validator(mode="after")
    def _only_settings_that_apply(self) -> ProblemSource:
        given = {"column": self.column, "answer_column": self.answer_column, "config": self.config}
        given["split"] = self.split if self.split != "train" else None
        applicable = () if self.is_generator else ("column", "answer_column") if self.is_file else tuple(given)
        for name, value in given.items():
            if value is not None and name not in applicable:
                kind = "generates its problems" if self.is_generator else "is a file"
                raise RacError(f"{name}={value!r} does not apply: source {self.source!r} {kind}; leave {name} out")
        return self


FILE_SUFFIXES = (".jsonl", ".json", ".parquet")
