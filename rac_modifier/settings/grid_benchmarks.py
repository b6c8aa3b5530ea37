"""What a user writes about the published benchmarks that `rac frontier` asks each model."""

from __future__ import annotations

from pydantic import Field

from rac_modifier.settings.base import Settings


class GridBenchmark(Settings):
    """A preset of `rac eval`; what is not set is as published."""

    preset: str = Field(
        min_length=1, description="math-500, aime24 or another name that `rac eval --preset` takes"
    )
    source: str | None = Field(
        None, min_length=1, description="a file with the preset's columns, or another dataset"
    )
    problems: int | None = Field(None, ge=1, description="how many problems; default: all")
    samples: int | None = Field(
        None, ge=1, description="answers per problem; default: the preset's"
    )
    cap: int | None = Field(
        None, ge=1, description="most new tokens per answer; default: the preset's"
    )
