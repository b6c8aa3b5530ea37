"""What a user sets about calibration: one schema for the recipe, Python and the command line."""

from __future__ import annotations

import math

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from rac_modifier.errors import RacError
from rac_modifier.traces.engines.settings import EngineSettings
from rac_modifier.traces.generation import SamplingSettings
from rac_modifier.traces.problems import ProblemSource

KINDS = ("traces", "prompts", "generic")


class TraceSettings(BaseModel):
    """Where the chain-of-thought traces come from: problems, sampling, and the store that keeps them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    store: str | None = Field(
        None,
        description="trace store (a .jsonl file) to read, and to append to when it holds too few tokens; "
        "default: a file under rac_traces/ named after the model, the problems and the sampling settings",
    )
    problems: ProblemSource = Field(ProblemSource(), description="the problems to think about")
    sampling: SamplingSettings = Field(SamplingSettings(), description="how the model is sampled")
    engine: EngineSettings | None = Field(
        None, description="OpenAI-compatible servers that sample; default: the model samples in this process"
    )
    retry_failed: bool = Field(
        False, description="try problems again that a server could not complete (the store's .failed.jsonl)"
    )
    allow_off_policy: bool = Field(
        False, description="calibrate on traces of another model; the store is then only read, never appended to"
    )


class GenericText(BaseModel):
    """Text that has nothing to do with the problems, the usual calibration set."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str = Field(
        "python-docs",
        description='"python-docs" (the documentation topics that Python ships, no download), '
        "a path to .txt, .jsonl or .parquet, or a Hugging Face dataset",
    )
    column: str | None = Field(None, description="the column that holds the text; not for python-docs or .txt")
    split: str = Field("train", description="split of a Hugging Face dataset")
    config: str | None = Field(None, description="configuration name of a Hugging Face dataset")
    sequence_tokens: int = Field(512, ge=16, description="tokens a sequence that the text is cut into")


class CalibrationSettings(BaseModel):
    """How much of what is calibrated on, and what each token weighs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tokens: int = Field(1_000_000, ge=1, description="budget of real tokens (padding never counts)")
    mixture: dict[str, float] = Field(
        {"traces": 1.0},
        description="share of the budget by kind: traces (each a prompt with its chain of thought), prompts, generic",
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
    generic: GenericText = Field(GenericText(), description="where generic text comes from")
    seed: int = Field(0, ge=0, description="shuffles each kind of sequence and the batches")

    @field_validator("mixture")
    @classmethod
    def _known_shares(cls, mixture: dict[str, float]) -> dict[str, float]:
        for kind, share in mixture.items():
            if kind not in KINDS:
                raise RacError(f"mixture names {kind!r}; the kinds are {', '.join(KINDS)}")
            if not (math.isfinite(share) and share >= 0):
                raise RacError(f"mixture gives {kind} the share {share}; use a number from 0 to 1")
        total = sum(mixture.values())
        if abs(total - 1) > 1e-6:
            raise RacError(f"the shares of mixture {mixture} sum to {total:g}; make them sum to 1")
        return {kind: mixture[kind] for kind in KINDS if mixture.get(kind, 0) > 0}

    @model_validator(mode="after")
    def _some_weight(self) -> CalibrationSettings:
        for name in ("prompt_weight", "trace_weight"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise RacError(f"{name} is {value}; use a finite number of at least 0")
        if self.prompt_weight == self.trace_weight == 0:
            raise RacError("prompt_weight and trace_weight are both 0, so no token would count; set one above 0")
        if self.trace_weight == 0 and self.mixture.get("traces"):
            raise RacError(
                "trace_weight is 0, so no chain-of-thought token would reach the Hessian; "
                "for a prompts-only baseline set mixture: {prompts: 1.0} instead"
            )
        return self
