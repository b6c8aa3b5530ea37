"""What a user sets about calibration: one schema for the recipe, Python and the command line."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema, field_validator, model_validator

from rac_modifier.errors import RacError
from rac_modifier.settings.mixture import Part, check_mixture, read_mixture
from rac_modifier.settings.traces import _Model

_SHARES = {"type": "object", "additionalProperties": {"type": "number"}}
Mixture = Annotated[
    dict[str, float], BeforeValidator(read_mixture), WithJsonSchema({"anyOf": [_SHARES, {"type": "string"}]})
]


class GenericText(_Model):
    """Text that has nothing to do with the problems, the usual calibration set."""

    source: str = Field(
        "python-docs",
        description='"python-docs" (the documentation topics that Python ships, no download), '
        "a path to .txt, .jsonl or .parquet, or a Hugging Face dataset",
    )
    column: str | None = Field(None, description="the column that holds the text; not for python-docs or .txt")
    split: str = Field("train", description="split of a Hugging Face dataset")
    config: str | None = Field(None, description="configuration name of a Hugging Face dataset")
    sequence_tokens: int = Field(512, ge=16, description="tokens a sequence that the text is cut into")


class CalibrationSettings(_Model):
    """How much of what is calibrated on, and what each token weighs."""

    tokens: int = Field(1_000_000, ge=1, description="budget of real tokens (padding never counts)")
    mixture: Mixture = Field(
        {"traces": 1.0},
        description="share of the budget by part: traces (each a prompt with its chain of thought), prompts, generic (or text), "
        'each with the name of a source or without; as a mapping or in a line: "traces:math@0.7, traces:code@0.2, text:c4@0.1"',
    )
    max_sequence_tokens: int | None = Field(
        None, ge=16, description="cut longer sequences to this many tokens (counted as truncated); default: never cut"
    )
    batch_tokens: int = Field(16_384, ge=16, description="rows x length of a padded batch at most")
    prompt_weight: float = Field(1.0, description="weight of a prompt token in the Hessian")
    trace_weight: float = Field(1.0, description="weight of a generated token in the Hessian")
    held_out_tokens: int = Field(
        2048,
        ge=0,
        description="traces of about as many tokens (four problems at least) are kept out of calibration, and the pruned model's "
        "divergence from the dense one on them is recorded: two forward passes over them; 0 leaves it out",
    )
    answer_weight: float | None = Field(
        None, description="weight of a generated token behind the thinking (</think>); default: trace_weight"
    )
    trace_weighting: Literal["uniform", "inverse_length", "correct"] = Field(
        "uniform",
        description="what each trace's tokens are multiplied with: uniform (1); inverse_length (each trace counts the same, "
        "however long); correct (wrong answers count 0)",
    )
    generic: GenericText = Field(GenericText(), description="where generic text comes from")
    texts: dict[str, GenericText] = Field({}, description="further texts, for a mixture to name: text:c4")
    seed: int = Field(0, ge=0, description="shuffles each kind of sequence and the batches")

    @field_validator("mixture")
    @classmethod
    def _known_shares(cls, mixture: dict[str, float]) -> dict[str, float]:
        return check_mixture(mixture)

    @model_validator(mode="after")
    def _weights_make_sense(self) -> CalibrationSettings:
        for name in ("prompt_weight", "trace_weight", "answer_weight"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise RacError(f"{name} is {value}; use a finite number of at least 0")
        if self.prompt_weight == self.trace_weight == 0 and not self.answer_weight:
            raise RacError("prompt_weight and trace_weight are both 0, so no token would count; set one above 0")
        if self.trace_weight == 0 and not self.answer_weight and self.parts("traces"):
            raise RacError(
                "trace_weight is 0, so no chain-of-thought token would reach the Hessian; "
                "for a prompts-only baseline set mixture: {prompts: 1.0} instead"
            )
        for part in self.parts("generic"):
            self.text(part.name)
        return self

    def parts(self, kind: Literal["traces", "prompts", "generic"]) -> list[Part]:
        """The parts of one kind that have a share."""
        return [part for part in map(Part.parse, self.mixture) if part.kind == kind]

    def share(self, kind: Literal["traces", "prompts", "generic"]) -> float:
        """Of the budget, over all parts of one kind."""
        return sum(self.mixture[part.key] for part in self.parts(kind))

    def text(self, name: str | None) -> GenericText:
        """The text of a part of the mixture: `generic`, a declared one, or a source by itself.

        Raises:
            RacError: a name that is neither.
        """
        if name is None:
            return self.generic
        if name in self.texts:
            return self.texts[name]
        if name != "python-docs" and "/" not in name and not name.endswith((".txt", ".jsonl", ".parquet")):
            declared = ", ".join(self.texts) or "none"
            raise RacError(
                f"mixture names text:{name}, which is not among calibration.texts ({declared}) and no text by itself "
                "(python-docs, a file or a dataset id)"
            )
        return GenericText(source=name)
